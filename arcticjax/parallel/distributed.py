"""Starting jax: which platform, how many processes.

Explicit start, for any machine: `ARCTICJAX_COORDINATOR=host:port`, `ARCTICJAX_PROCESSES=n`,
`ARCTICJAX_PROCESS=i` in the environment of each process (they differ per process, so they are not
part of the config). Otherwise Slurm, Open MPI and TPU slices of GKE are recognised by the variables
that jax itself detects them by; TPU VMs need the explicit start.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import jax

from arcticjax import errors

_EXPLICIT = ("ARCTICJAX_COORDINATOR", "ARCTICJAX_PROCESSES", "ARCTICJAX_PROCESS")
_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
_EXTRAS = {"gpu": "cuda", "tpu": "tpu"}
# Where a process that leaves with an error says so, by its number.
LEAVING = "arcticjax/leaving"
_LAST_WORDS_MS = 5000
# What a process may take from saying so to its end, on a machine that is busy.
_LAST_BREATH_SECONDS = 1.0


@dataclass(frozen=True)
class Cluster:
    """How the processes of a run find each other; `coordinator` is None where jax detects
    everything itself."""

    kind: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def detect(environ: Mapping[str, str]) -> Cluster | None:
    """The cluster that `environ` describes, or None for a run of one process; ConfigError if it is
    half described."""
    given = [name for name in _EXPLICIT if environ.get(name)]
    if given:
        missing = [name for name in _EXPLICIT if name not in given]
        if missing:
            raise errors.ConfigError(
                f"distributed start: {', '.join(given)} set but {', '.join(missing)} not; set all "
                "three or none"
            )
        try:
            processes, process = (int(environ[name]) for name in _EXPLICIT[1:])
        except ValueError:
            raise errors.ConfigError(
                f"distributed start: ARCTICJAX_PROCESSES={environ[_EXPLICIT[1]]!r} and "
                f"ARCTICJAX_PROCESS={environ[_EXPLICIT[2]]!r} must be whole numbers"
            ) from None
        if not 0 <= process < processes:
            raise errors.ConfigError(
                f"distributed start: ARCTICJAX_PROCESS={process} is not in 0..{processes - 1} "
                f"(ARCTICJAX_PROCESSES={processes})"
            )
        if processes == 1:
            return None
        return Cluster("explicit", environ[_EXPLICIT[0]], processes, process)
    if int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in environ:
        return Cluster("slurm")
    if int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return Cluster("openmpi")
    if (
        "," in environ.get("TPU_WORKER_HOSTNAMES", "")
        or int(environ.get("MEGASCALE_NUM_SLICES", "1")) > 1
    ):
        return Cluster("tpu")
    return None


def start(platform: str = "auto", policy: str = "required") -> None:
    """Chooses the platform and joins the cluster, if any; must precede any other use of jax.

    `policy='preferred'` falls back to cpu, with a line on stderr, where `platform` has no device
    here. Raises ConfigError where a required platform is missing.
    """
    if platform != "auto":
        wanted = _PLATFORMS[platform]
        jax.config.update("jax_platforms", wanted if policy == "required" else f"{wanted},cpu")
    cluster = detect(os.environ)
    if cluster is not None:
        jax.distributed.initialize(cluster.coordinator, cluster.processes, cluster.process)
    try:
        found = jax.default_backend()
    except RuntimeError as problem:
        if platform == "auto" or policy == "required":
            extra = _EXTRAS.get(platform)
            advice = f"install arcticjax[{extra}], or " if extra else ""
            fallback = "set mesh.policy: preferred to fall back to cpu"
            if platform == "auto":
                advice, fallback = "", "set mesh.platform: cpu to do without"
            raise errors.ConfigError(
                f"mesh.platform: no {platform} device on this machine ({problem}); "
                f"{advice}{fallback}"
            ) from problem
        jax.config.update("jax_platforms", "cpu")
        found = jax.default_backend()
    if platform != "auto" and found != platform and talks():
        print(
            f"WARNING: mesh.platform is {platform}, but this machine has none: running on {found}",
            file=sys.stderr,
        )


def leave(code: int) -> NoReturn:
    """Exits; a process that fails among others does not wait for them at jax's shutdown barrier.

    Process 0 runs the service that holds the others together, and with its end they are killed:
    it goes last, so that each can say why it stops and exit with its own code, but waits for
    `_LAST_WORDS_MS` at most, as some may not know yet that there is anything to stop for.
    """
    if code and jax.distributed.is_initialized():
        client = coordination_service()
        try:
            say_leaving(code)
            if talks():
                for process in range(1, jax.process_count()):
                    client.blocking_key_value_get(f"{LEAVING}/{process}", _LAST_WORDS_MS)
                time.sleep(_LAST_BREATH_SECONDS)
        except jax.errors.JaxRuntimeError:
            pass
        os._exit(code)
    sys.exit(code)


def say_leaving(code: int) -> None:
    """Tells the other processes that this one ends with an error's exit code."""
    coordination_service().key_value_set(f"{LEAVING}/{jax.process_index()}", str(code))


def coordination_service() -> Any:
    """The client of the service that jax's processes start by: a store of keys and values, and
    barriers, that needs no device."""
    # jax has no public way to it.
    from jax._src.distributed import global_state

    return global_state.client


def by_process(client: Any, folder: str) -> dict[int, str]:
    """What each process put into a folder of the service."""
    return {
        int(key.rpartition("/")[2]): value for key, value in client.key_value_dir_get(f"{folder}/")
    }


def rank() -> int:
    """Which process this is, of those that jax started; starts nothing itself."""
    return jax.process_index() if several() else 0


def several() -> bool:
    """Whether this is one of several processes of a run; starts nothing itself."""
    return jax.distributed.is_initialized()


def talks() -> bool:
    """Whether this is the process that prints and writes reports (process 0)."""
    return jax.process_index() == 0
