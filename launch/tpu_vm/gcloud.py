"""The gcloud commands of a TPU VM job, as lists of words."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from launch.tpu_vm.spec import TpuVmSpec

# In the home directory of every worker; private to the user.
REMOTE = "arcticjax-launch"
WORKER_SCRIPT = Path(__file__).with_name("worker.sh")


def _tpus(spec: TpuVmSpec, verb: str, *words: str) -> list[str]:
    where = [f"--zone={spec.zone}"]
    if spec.project is not None:
        where.append(f"--project={spec.project}")
    return ["gcloud", "compute", "tpus", "queued-resources", verb, *words, *where]


def describe(spec: TpuVmSpec) -> list[str]:
    """The queued resource as JSON; fails where there is none."""
    return _tpus(spec, "describe", spec.name, "--format=json")


def create(spec: TpuVmSpec) -> list[str]:
    """Asks for the slices; they come when there is room."""
    nodes = (
        [f"--node-id={spec.name}"]
        if spec.slices == 1
        else [f"--node-count={spec.slices}", f"--node-prefix={spec.name}"]
    )
    return _tpus(
        spec,
        "create",
        spec.name,
        f"--accelerator-type={spec.accelerator}",
        f"--runtime-version={spec.software}",
        *nodes,
        *(["--spot"] if spec.spot else []),
    )


def delete(spec: TpuVmSpec) -> list[str]:
    """Gives the slices back, and the request with them."""
    return _tpus(spec, "delete", spec.name, "--force", "--quiet")


def on_all_workers(spec: TpuVmSpec, command: Sequence[str]) -> list[str]:
    """Runs a command on every worker of every slice at once."""
    # A remote shell takes the command apart again.
    return _tpus(
        spec,
        "ssh",
        spec.name,
        "--node=all",
        "--worker=all",
        "--quiet",
        f"--command={shlex.join(command)}",
    )


def copy_to_all_workers(spec: TpuVmSpec, files: Sequence[str]) -> list[str]:
    """Copies local files into the job's folder on every worker."""
    target = f"{spec.name}:{REMOTE}/"
    return _tpus(spec, "scp", *files, target, "--node=all", "--worker=all", "--quiet")


def worker(spec: TpuVmSpec, *words: str) -> list[str]:
    """Runs a verb of worker.sh on every worker."""
    return on_all_workers(spec, ["bash", f"{REMOTE}/{WORKER_SCRIPT.name}", *words])
