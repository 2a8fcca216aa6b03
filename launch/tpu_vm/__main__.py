"""Command line of TPU VM jobs."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from arcticjax.errors import ArgumentParser, ConfigError, run_cli
from launch.commands import Runner
from launch.specs import load
from launch.tpu_vm import babysit, gcloud
from launch.tpu_vm.spec import TpuVmSpec

_VERBS = {
    "create": "ask for the slices (a request that is there is left alone)",
    "setup": "send the committed code to all workers and install it",
    "start": "start the command on all workers (one that runs is left alone)",
    "status": "what every worker does",
    "logs": "the last lines of every worker's log",
    "stop": "let every process save and end",
    "delete": "stop paying: give the slices back",
    "babysit": "all of it until the run is done: create, set up, start, and again after preemption",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; raises ArcticError for what the user can mend."""
    verbs = "\n".join(f"  {verb:8} {text}" for verb, text in _VERBS.items())
    parser = ArgumentParser(
        prog="python -m launch.tpu_vm",
        description=f"Run a job on TPU VMs. Every verb may be repeated.\n\n{verbs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=_VERBS)
    parser.add_argument("spec", metavar="SPEC", help="YAML file; see launch/tpu_vm/example.yaml")
    parser.add_argument("--lines", type=int, default=50, help="of each log (%(default)s)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands that would run, and stop"
    )
    options = parser.parse_args(arguments)
    job = Job(load(options.spec, TpuVmSpec), Runner(options.dry_run))
    if options.verb == "logs":
        return job.logs(options.lines)
    if options.verb == "babysit" and not options.dry_run:
        return job.babysit()
    if options.verb == "babysit":
        return job.show_all()
    return getattr(job, options.verb)()


class Job:
    """The verbs of one job."""

    def __init__(self, spec: TpuVmSpec, runner: Runner) -> None:
        self.spec = spec
        self.runner = runner

    def create(self) -> int:
        """Asks for the slices, unless that was done."""
        # What would end the set-up is said before anything is paid for.
        self._environment_file()
        if not self.runner.dry_run and self._resource() is not None:
            print(f"{self.spec.name} is there already")
            return 0
        return self.runner.run(gcloud.create(self.spec))

    def delete(self) -> int:
        """Gives the slices back, if there are any."""
        if not self.runner.dry_run and self._resource() is None:
            print(f"{self.spec.name} is not there")
            return 0
        return self.runner.run(gcloud.delete(self.spec))

    def setup(self) -> int:
        """Sends the committed code, worker.sh and the environment file, and installs them."""
        with contextlib.ExitStack() as stack:
            folder = "."
            if not self.runner.dry_run:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
            archive, environment = f"{folder}/code.tar.gz", f"{folder}/env"
            files = [os.fspath(gcloud.WORKER_SCRIPT), archive]
            commands = [["git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"]]
            source = self._environment_file()
            if source is not None:
                # Under the name that worker.sh reads.
                commands.append(["install", "-m", "600", source, environment])
                files.append(environment)
            nfs = [self.spec.nfs] if self.spec.nfs is not None else []
            commands += [
                gcloud.on_all_workers(self.spec, ["mkdir", "-p", "-m", "700", gcloud.REMOTE]),
                gcloud.copy_to_all_workers(self.spec, files),
                gcloud.worker(self.spec, "setup", self.revision(), *nfs),
            ]
            for command in commands:
                code = self.runner.run(command)
                if code:
                    return code
        return 0

    def start(self) -> int:
        """Starts the command on all workers."""
        return self.runner.run(gcloud.worker(self.spec, "start", *self.spec.process))

    def stop(self) -> int:
        """Ends the command on all workers, which save first."""
        return self.runner.run(gcloud.worker(self.spec, "stop"))

    def status(self) -> int:
        """Shows the request's state and every worker's."""
        code = self.runner.run(gcloud.describe(self.spec))
        return code or self.runner.run(gcloud.worker(self.spec, "status"))

    def logs(self, lines: int) -> int:
        """Shows the end of every worker's log."""
        return self.runner.run(gcloud.worker(self.spec, "logs", str(lines)))

    def revision(self) -> str:
        """The commit that is sent."""
        code, out, said = self.runner.read(["git", "rev-parse", "HEAD"])
        if code:
            raise ConfigError(
                f"the code that is sent is the committed state of the folder this is started in, "
                f"but git says: {said.strip()}"
            )
        return out.strip()

    def show_all(self) -> int:
        """Prints every command that the babysitter uses, in the order of a run without trouble."""
        for verb in (self.create, self.setup, self.start, self.status, self.delete):
            verb()
        return 0

    def babysit(
        self,
        limits: babysit.Limits | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> int:
        """Keeps the job going until it is done or would fail again; the run's exit code.

        The slices stay, for their logs: `delete` gives them back.
        """
        self._environment_file()
        revision = self.revision()
        try:
            return self._keep_going(revision, limits or babysit.Limits(), sleep, clock)
        finally:
            print(
                f"{self.spec.name}: the slices are still there, for their logs, and cost money; "
                f"to delete them: {shlex.join(gcloud.delete(self.spec))}",
                flush=True,
            )

    def _keep_going(
        self,
        revision: str,
        limits: babysit.Limits,
        sleep: Callable[[float], None],
        clock: Callable[[], float],
    ) -> int:
        memory, said = babysit.Memory(), ""
        actions = {
            "create": self.create,
            "delete": self.delete,
            "setup": self.setup,
            "start": self.start,
            "stop": self.stop,
        }
        while True:
            seen = self._look(clock())
            step, memory = babysit.decide(seen, memory, revision, limits)
            if step.say != said:
                print(f"{self.spec.name}: {step.say}", flush=True)
                said = step.say
            if step.action == "end":
                return step.code
            if step.action == "start":
                sleep(step.wait_seconds)
            # One that fails shows in the next look, and is tried again within the limits.
            if step.action in actions and actions[step.action]():
                sleep(babysit.POLL_SECONDS)
            if step.action != "start":
                sleep(step.wait_seconds)

    def _look(self, now: float) -> babysit.Seen:
        resource = self._resource()
        if resource != "ACTIVE":
            return babysit.Seen(now, resource)
        code, out, _ = self.runner.read(gcloud.worker(self.spec, "status"))
        workers = babysit.read_workers(out)
        if code and not workers:
            # A fresh worker has no worker.sh yet, and bash says so with 127.
            reached, _, _ = self.runner.read(gcloud.on_all_workers(self.spec, ["true"]))
            if not reached:
                return babysit.Seen(now, resource, (babysit.Worker("?", "none", "idle"),))
        return babysit.Seen(now, resource, workers, answered=not code)

    def _resource(self) -> str | None:
        code, out, said = self.runner.read(gcloud.describe(self.spec))
        if not code:
            return babysit.read_resource(out)
        if "NOT_FOUND" in said or "not found" in said.lower():
            return None
        raise ConfigError(f"gcloud: {' '.join(said.split()) or f'exit code {code}'}")

    def _environment_file(self) -> str | None:
        """The environment file, if the spec names one; only its owner may read it."""
        if self.spec.env_file is None:
            return None
        source = Path(self.spec.env_file).expanduser()
        if not source.is_file():
            raise ConfigError(
                f"env_file: no file {source}; make it (NAME=value lines, chmod 600), or take "
                "env_file out of the spec if the run needs no tokens"
            )
        if source.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"env_file: others can read {source}; chmod 600 {source}")
        return os.fspath(source)


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
