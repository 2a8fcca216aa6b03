"""The device mesh, and how batches and parameters lie on it.

Axes: `data` (the global batch) and `fsdp`. Batches are cut along both; parameters are replicated.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from arcticjax import errors

AXES = ("data", "fsdp")
# Axis 0 of every batch array is the device; it is cut along both mesh axes.
BATCH = P(AXES)
REPLICATED = P()


def make_mesh(
    data: int | str = "auto", fsdp: int = 1, *, among: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of `data` x `fsdp` devices; 'auto' takes every device.

    among: the devices to choose from; None: all of this run's. One process may use a part of its
    devices. Raises ConfigError where the devices do not suffice or do not divide.
    """
    found = jax.devices() if among is None else among
    devices = len(found)
    if data == "auto":
        if devices % fsdp:
            raise errors.ConfigError(
                f"mesh.fsdp: {fsdp} does not divide the {devices} devices at hand"
            )
        data = devices // fsdp
    size = int(data) * fsdp
    if size > devices:
        raise errors.ConfigError(
            f"mesh.data x mesh.fsdp = {data} x {fsdp} = {size} devices, but {devices} are at hand; "
            "lower mesh.data or set it to auto"
        )
    processes = len({device.process_index for device in found})
    if size < devices and processes > 1:
        raise errors.ConfigError(
            f"mesh.data x mesh.fsdp = {size}, but the {processes} processes have "
            f"{devices} devices; with several processes every device must be used: set mesh.data "
            "to auto"
        )
    return _mesh(int(data), fsdp, found[:size])


def local_mesh() -> Mesh:
    """One device of this process: for work that one process does alone."""
    return _mesh(1, 1, jax.local_devices()[:1])


def _mesh(data: int, fsdp: int, devices: Sequence[Any]) -> Mesh:
    # Positional and Auto: the argument's name and the default axis type changed between jax
    # versions.
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def one_at_a_time() -> bool:
    """Whether to wait for every program before the next one starts.

    Several devices of one CPU share its threads: programs in flight wait for one another until a
    rendezvous times out.
    """
    return jax.default_backend() == "cpu" and jax.local_device_count() > 1


def device_memory() -> int | None:
    """Bytes that one device of this process may use; None where that cannot be told."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":  # its devices share the machine's memory
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return whole // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 over all devices."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, REPLICATED)


def local_positions(mesh: Mesh) -> list[int]:
    """Positions along axis 0 of a batch that belong to this process's devices, in order."""
    return [
        position
        for position, device in enumerate(mesh.devices.flat)
        if device.process_index == jax.process_index()
    ]


def host_to_global(mesh: Mesh, local: Any) -> Any:
    """Global arrays cut along axis 0 from this process's part (a tree of [local devices, ...] numpy
    arrays)."""
    sharding = batch_sharding(mesh)
    devices = mesh.devices.size
    return jax.tree.map(
        lambda part: jax.make_array_from_process_local_data(
            sharding, part, (devices, *part.shape[1:])
        ),
        local,
    )


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A tree of host arrays as global arrays with a whole copy on every device.

    Each process gives the same values; nothing is sent between processes.
    """
    sharding = replicated(mesh)

    def one(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(one, tree)
