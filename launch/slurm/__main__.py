"""Command line of Slurm jobs."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from arcticjax.errors import ArgumentParser, ConfigError, run_cli
from launch.commands import Runner
from launch.specs import Positive, Spec, Text, load

SCRIPT = Path(__file__).with_name("run.sbatch")
_VERBS = {
    "submit": "put the job into the queue (one of its name that is there is left alone)",
    "status": "the job in the queue",
    "logs": "the last lines of its output",
    "stop": "SIGTERM to every task: the run saves, and the job goes back into the queue",
    "delete": "take the job out of the queue; its tasks get SIGTERM",
}


class SlurmSpec(Spec):
    """A run under Slurm. The folder it is submitted from, and the run directory, must be on a disk
    that all nodes share."""

    nodes: Positive = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Each gets a task of its own, as jax expects under Slurm."
    )
    tasks_per_node: Positive = Field(
        default=1, description="Processes of a node without GPUs; with GPUs it is left out."
    )
    cpus_per_task: Positive = 1
    memory_per_node: Annotated[str, Field(pattern=r"^[0-9]+[KMGT]?$")] | None = Field(
        default=None, description="Such as 64G; left out: the cluster's default."
    )
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d\d){0,2}$")] | None = Field(
        default=None, description="Limit of one start, [days-]hours:minutes:seconds."
    )
    partition: Text | None = None
    account: Text | None = None
    constraint: Text | None = None
    signal_seconds: Annotated[int, Field(ge=30, le=3600)] = Field(
        default=120, description="So long before the time limit the run is told to save."
    )
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 20
    env_file: Text | None = Field(
        default=None, description="File of NAME=value lines on the shared disk: tokens go here."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; raises ArcticError for what the user can mend."""
    verbs = "\n".join(f"  {verb:7} {text}" for verb, text in _VERBS.items())
    parser = ArgumentParser(
        prog="python -m launch.slurm",
        description=f"Run a job under Slurm. Every verb may be repeated.\n\n{verbs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=_VERBS)
    parser.add_argument(
        "spec", metavar="SPEC", help="YAML file; see launch/slurm/gpu.yaml and cpu.yaml"
    )
    parser.add_argument("--lines", type=int, default=50, help="of the output (%(default)s)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands that would run, and stop"
    )
    options = parser.parse_args(arguments)
    spec, runner = load(options.spec, SlurmSpec), Runner(options.dry_run)
    if options.verb == "submit":
        return _submit(spec, runner)
    if options.verb == "status":
        return runner.run(["squeue", "--me", f"--name={spec.name}", "--long"])
    if options.verb == "logs":
        return runner.run(["tail", "-n", str(options.lines), f"{spec.name}.log"])
    signal = ["--signal=TERM"] if options.verb == "stop" else []
    return runner.run(["scancel", "--me", f"--name={spec.name}", *signal])


def submission(spec: SlurmSpec) -> list[str]:
    """The sbatch command of a spec."""
    options = [
        f"--job-name={spec.name}",
        f"--output={spec.name}.log",
        f"--nodes={spec.nodes}",
        f"--ntasks-per-node={spec.gpus_per_node or spec.tasks_per_node}",
        f"--cpus-per-task={spec.cpus_per_task}",
        f"--signal=TERM@{spec.signal_seconds}",
    ]
    if spec.gpus_per_node:
        options.append(f"--gpus-per-node={spec.gpus_per_node}")
    for name, value in (
        ("mem", spec.memory_per_node),
        ("time", spec.time),
        ("partition", spec.partition),
        ("account", spec.account),
        ("constraint", spec.constraint),
    ):
        if value is not None:
            options.append(f"--{name}={value}")
    environment = "-" if spec.env_file is None else os.fspath(_readable_by_owner(spec.env_file))
    return [
        "sbatch",
        *options,
        os.fspath(SCRIPT),
        str(spec.max_restarts),
        environment,
        *spec.process,
    ]


def _submit(spec: SlurmSpec, runner: Runner) -> int:
    if not runner.dry_run:
        code, out, said = runner.read(["squeue", "--me", f"--name={spec.name}", "--noheader"])
        if code:
            raise ConfigError(f"squeue: {' '.join(said.split())}")
        if out.strip():
            print(f"{spec.name} is in the queue already:\n{out.rstrip()}")
            return 0
    return runner.run(submission(spec))


def _readable_by_owner(file: str) -> Path:
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        raise ConfigError(f"env_file: no file {path}")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"env_file: others can read {path}; chmod 600 {path}")
    return path


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
