"""Slices and GPUs by name, the chips they are made of, and their devices without the chips.

`v5e:16x16` names a kind of chip and how many stand along each side, `h200:8` how many GPUs (see
`gpus`). The `libtpu` wheel describes a slice and compiles for it on any x86 machine
(jax.experimental.topologies); nothing is executed. Found by trial with libtpu 0.0.42 and jax 0.10:

- No variable has to be set. TPU_SKIP_MDS_QUERY keeps it from asking a metadata server that is not
  there; TPU_ACCELERATOR_TYPE and TPU_WORKER_HOSTNAMES only silence its complaint that it found
  none. Two processes at once need ALLOW_MULTIPLE_LIBTPU_LOAD: the wheel takes a lock on the machine
  (/tmp/libtpu_lockfile) though no device is opened.
- Hosts have 2x2x1 chips: each of the first two sides must be even, and one chip cannot be had.
- v4 is described as two devices of half a chip's memory each, so it is left out here.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arcticjax import errors
from arcticjax.config.checks import nearest
from arcticjax.parallel.chips import CHIPS, Chip, Gpu, gpu_share
from arcticjax.plan import gpus

# Each fake device has threads of its own; described GPUs are no more.
MOST_DEVICES = 1024

_NAME = re.compile(r"(?P<kind>[A-Za-z0-9]+):(?P<sides>\d+(?:x\d+)*)")
# Read by jax and XLA when they are loaded.
_ENVIRONMENT = {
    # What was compiled for devices that are not there cannot be read back.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    # The log of an ordinary start and compilation would bury ours.
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Target:
    """What a program is compiled for: a TPU slice (`chip` and its `sides`), GPUs (one side, their
    number), `devices` fake CPU devices, or, with none of these, the devices of this machine."""

    name: str
    chip: Chip | None = None
    sides: tuple[int, ...] = ()
    devices: int = 0

    @property
    def ici_bandwidth(self) -> float:
        """Bytes a second that a chip sends over all its links; a side that closes into no ring has
        half of its links idle."""
        assert self.chip is not None
        open_sides = sum(side % self.chip.ring != 0 for side in self.sides)
        return self.chip.ici_bandwidth * (1 - open_sides / 2 / len(self.sides))

    @property
    def hosts(self) -> int:
        """Hosts of GPUs; 1 for other targets, whose network between hosts is that between chips."""
        return -(-self.sides[0] // self.chip.per_host) if isinstance(self.chip, Gpu) else 1

    def bandwidth(self, group: Sequence[int]) -> float:
        """Bytes a second that each of these chips, by their places in the mesh, sends to the next.

        GPUs of several hosts: rings cross from host to host by the adapters of all GPUs that take
        part, whose sum no GPU of the ring can exceed.
        """
        if not isinstance(self.chip, Gpu) or self.hosts == 1:
            return self.ici_bandwidth
        sharing = Counter(place // self.chip.per_host for place in group)
        if len(sharing) == 1:
            return self.ici_bandwidth
        return min(self.ici_bandwidth, min(sharing.values()) * self.chip.network_bandwidth)

    def slices(self, wanted: int | str) -> int | str:
        """What `mesh.slices` comes to: `auto` is the hosts of GPUs, as real ones report it."""
        return self.hosts if wanted == "auto" and self.hosts > 1 else wanted


def parse(name: str | None) -> Target:
    """The target that a name means; None means this machine. Raises ConfigError."""
    if name is None:
        return Target("local")
    match = _NAME.fullmatch(name.strip())
    kinds = [*CHIPS, "cpu"]
    if match is None:
        raise errors.ConfigError(
            f"--topology: {name!r} is not KIND:SIZE; write for example v5e:16x16, v5p:4x4x4, "
            f"v6e:8x8, h200:8 or cpu:8 (kinds: {', '.join(kinds)})"
        )
    kind, sides = match["kind"].lower(), tuple(map(int, match["sides"].split("x")))
    if kind == "cpu":
        if len(sides) != 1 or not 1 <= sides[0] <= MOST_DEVICES:
            raise errors.ConfigError(
                f"--topology: {name!r}: cpu takes one number of devices, at most "
                f"{MOST_DEVICES}, such as cpu:8"
            )
        return Target(name, devices=sides[0])
    if kind not in CHIPS:
        close = nearest(kind, kinds)
        hint = f"; did you mean {close}:{match['sides']}?" if close else ""
        raise errors.ConfigError(
            f"--topology: no chip {kind!r} is known{hint} (kinds: {', '.join(kinds)})"
        )
    chip = CHIPS[kind]
    if isinstance(chip, Gpu):
        _check_count(name, chip, sides)
    elif len(sides) != chip.sides or not all(sides) or sides[0] % 2 or sides[1] % 2:
        example = "x".join(str(max(2, side + side % 2)) for side in (*sides, 4, 4)[: chip.sides])
        raise errors.ConfigError(
            f"--topology: {name!r}: a slice of {kind} has {chip.sides} sides, and its hosts have "
            f"2x2 chips, so the first two sides are even; the nearest is {kind}:{example}"
        )
    return Target(name, chip=chip, sides=sides)


def _check_count(name: str, chip: Gpu, sides: tuple[int, ...]) -> None:
    count = sides[0]
    uneven = count > chip.per_host and count % chip.per_host
    if len(sides) != 1 or not 1 <= count <= MOST_DEVICES or uneven:
        raise errors.ConfigError(
            f"--topology: {name!r}: {chip.name} takes one number of GPUs: 1 to {chip.per_host} on "
            f"one host, or a multiple of {chip.per_host}, at most {MOST_DEVICES}, such as "
            f"{chip.name}:{chip.per_host}"
        )


def prepare_environment(target: Target) -> None:
    """Sets what jax and XLA read when they start; must come before jax is imported."""
    if target.name == "local":
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if target.devices:
        flag = f"--xla_force_host_platform_device_count={target.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    if target.chip is not None:
        os.environ.update(_ENVIRONMENT)
        if not isinstance(target.chip, Gpu):
            os.environ.update(_TPU_ENVIRONMENT)


def open_devices(target: Target) -> list[Any]:
    """The devices of a target, described or real.

    Raises ConfigError where the compiler is missing or knows no such slice.
    """
    import jax

    if target.chip is None:
        found = jax.devices()
        if len(found) < target.devices:
            raise errors.ConfigError(
                f"--topology: {target.name} needs {target.devices} devices, but jax started with "
                f"{len(found)}"
            )
        return found[: target.devices] if target.devices else found
    if isinstance(target.chip, Gpu):
        return gpus.open_devices(target.name, target.chip, target.sides[0])
    if importlib.util.find_spec("libtpu") is None:
        raise errors.ConfigError(
            f"--topology: {target.name} needs the TPU compiler, which is not installed: "
            "install arcticjax[tpu] (uv run --extra tpu; Linux on x86; no TPU is needed), "
            "or plan for cpu:8"
        )
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=target.name).devices
    except Exception as problem:  # jaxlib's own, without a class that could be named
        raise errors.ConfigError(
            f"--topology: libtpu knows no slice {target.name}: {str(problem).splitlines()[0]}"
        ) from problem
    if len(found) != math.prod(target.sides):
        raise errors.ConfigError(
            f"--topology: libtpu describes {target.name} as {len(found)} devices, not one a chip, "
            "which this version cannot plan for"
        )
    return list(found)


def memory(target: Target) -> int | None:
    """Bytes of one device that a program may use; None where that cannot be told."""
    if target.chip is not None:
        return target.chip.usable_bytes
    from arcticjax.parallel import mesh as meshes

    return meshes.device_memory()


def memory_note(target: Target) -> str | None:
    """Where a device's memory is only counted in part: which."""
    if not isinstance(target.chip, Gpu):
        return None
    return (
        f"memory: {gpu_share():g} of the {target.chip.hbm_bytes / 2**30:.2f} GiB of a GPU, as jax "
        "takes here; XLA_PYTHON_CLIENT_MEM_FRACTION gives it another share"
    )
