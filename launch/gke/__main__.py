"""Command line of GKE jobs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import yaml

from arcticjax.errors import ArgumentParser, ConfigError, run_cli
from launch.commands import Runner
from launch.gke import manifest
from launch.gke.spec import GkeSpec
from launch.specs import load

_VERBS = {
    "render": "print the JobSet",
    "render-queue": "print Kueue's objects for the spec's queue, with room for this run",
    "submit": "apply the JobSet (one that is there and unchanged is left alone)",
    "status": "the JobSet and its pods",
    "logs": "follow the log of every process",
    "delete": "delete the JobSet, if it is there; its processes save first",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; raises ArcticError for what the user can mend."""
    verbs = "\n".join(f"  {verb:12} {text}" for verb, text in _VERBS.items())
    parser = ArgumentParser(
        prog="python -m launch.gke",
        description=f"Run a job on GKE as a JobSet. Every verb may be repeated.\n\n{verbs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=_VERBS)
    parser.add_argument("spec", metavar="SPEC", help="YAML file; see launch/gke/example.yaml")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands that would run, and stop"
    )
    options = parser.parse_args(arguments)
    spec = load(options.spec, GkeSpec)
    if options.verb == "render":
        print(_text([manifest.jobset(spec)]), end="")
        return 0
    if options.verb == "render-queue":
        if spec.queue is None:
            raise ConfigError(f"{options.spec}: queue is not set, so there is none to render")
        print(_text(manifest.queue(spec)), end="")
        return 0
    return _run(options.verb, spec, Runner(options.dry_run))


def _run(verb: str, spec: GkeSpec, runner: Runner) -> int:
    kubectl = ["kubectl", f"--namespace={spec.namespace}"]
    chosen = f"--selector=jobset.sigs.k8s.io/jobset-name={spec.name}"
    if verb == "submit":
        return runner.run([*kubectl, "apply", "-f", "-"], stdin=_text([manifest.jobset(spec)]))
    if verb == "status":
        code = runner.run([*kubectl, "get", "jobset", spec.name])
        return code or runner.run([*kubectl, "get", "pods", chosen])
    if verb == "logs":
        most = f"--max-log-requests={spec.nodes * spec.groups}"
        return runner.run([*kubectl, "logs", chosen, "--follow", "--prefix", "--tail=-1", most])
    return runner.run([*kubectl, "delete", "jobset", spec.name, "--ignore-not-found"])


def _text(objects: list[dict[str, object]]) -> str:
    return yaml.safe_dump_all(objects, sort_keys=False, width=100, allow_unicode=True)


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
