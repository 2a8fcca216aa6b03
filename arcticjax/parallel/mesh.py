"""The device mesh, and how batches and parameters lie on it.

Axes: `slice` (groups of devices with a slow network between them), `data` (the global batch) and
`fsdp`. Batches are cut along all three, slice by slice; for parameters see `sharding`. An axis
that is not used has size 1.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from arcticjax import errors

SLICE = "slice"
# Between the devices of one slice the network is fast.
WITHIN_SLICE = ("data", "fsdp")
AXES = (SLICE, *WITHIN_SLICE)
# Axis 0 of every batch array is the device; it is cut along all mesh axes.
BATCH = P(AXES)
REPLICATED = P()


def make_mesh(
    data: int | str = "auto",
    fsdp: int = 1,
    slices: int | str = "auto",
    *,
    among: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of `data` x `fsdp` devices in `slices` equal parts, which share `data`.

    'auto' takes every device, and as many slices as the devices report. Where they report one
    only, slices are groups of processes, or parts of one process's devices. among: the devices to
    choose from; None: all of this run's. One process may use a part of its devices. Raises
    ConfigError where the devices do not suffice or do not divide.
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
    chosen = found[:size]
    slices = _slices(slices, int(data), chosen)
    return _mesh(slices, int(data) // slices, fsdp, chosen)


def local_mesh() -> Mesh:
    """One device of this process: for work that one process does alone."""
    return _mesh(1, 1, 1, jax.local_devices()[:1])


def _slices(wanted: int | str, data: int, devices: Sequence[Any]) -> int:
    """How many slices the mesh has; ConfigError where the devices cannot be cut so."""
    reported, processes = _reported_slices(devices), _processes(devices)
    slices = reported if wanted == "auto" else int(wanted)
    # TPUs know their slices; a CPU or GPU that reports one slice may only not know better.
    if slices != reported and (reported > 1 or devices[0].platform == "tpu"):
        raise errors.ConfigError(
            f"mesh.slices: {slices}, but the devices report {reported} slice(s); set it to auto"
        )
    if data % slices:
        raise errors.ConfigError(
            f"mesh.slices: {slices} slices cannot share the {data} devices of mesh.data equally; "
            "take a divisor, or set it to auto"
        )
    if reported == 1 and processes > 1 and processes % slices:
        raise errors.ConfigError(
            f"mesh.slices: {processes} processes do not make {slices} equal slices, and the "
            "devices report none of their own; take a divisor, or set it to auto"
        )
    return slices


def _reported_slices(devices: Sequence[Any]) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})


def _processes(devices: Sequence[Any]) -> int:
    return len({device.process_index for device in devices})


def _mesh(slices: int, data: int, fsdp: int, devices: Sequence[Any]) -> Mesh:
    # Auto: the default axis type changed between jax versions, as did make_mesh's argument names.
    types = (AxisType.Auto,) * len(AXES)
    if slices == 1:
        return jax.make_mesh((1, data, fsdp), AXES, axis_types=types, devices=devices)
    if _reported_slices(devices) > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            (1, data, fsdp), (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    elif (processes := _processes(devices)) > 1:
        # Neighbouring processes make a slice: axis 1 runs over them, then over their devices.
        together = processes // slices
        grid = mesh_utils.create_hybrid_device_mesh(
            (1, len(devices) // processes, 1),
            (slices, together, 1),
            devices,
            process_is_granule=True,
        ).reshape(slices, data, fsdp)
    else:
        grid = np.array(devices).reshape(slices, data, fsdp)
    return Mesh(grid, AXES, axis_types=types)


def gather(local: jax.Array) -> jax.Array:
    """Every device's `local` along axis 0, in the order of a batch's first axis; for use inside
    `shard_map` over the mesh.

    Inside a slice first, then, where there are several, across slices. The transpose is a
    reduce-scatter for each, in the opposite order.
    """
    gathered = jax.lax.all_gather(local, WITHIN_SLICE, tiled=True)
    if jax.lax.axis_size(SLICE) > 1:
        gathered = jax.lax.all_gather(gathered, SLICE, tiled=True)
    return gathered


def one_at_a_time() -> bool:
    """Whether to wait for every program before the next one starts.

    Several devices of one CPU share its threads: programs in flight wait for one another until a
    rendezvous times out.
    """
    return jax.default_backend() == "cpu" and jax.local_device_count() > 1


def call_waits() -> bool:
    """Whether a call of a compiled step with loops of dynamic length returns only when the step is
    all but done: on a GPU the host reads before every turn of a loop whether there is another."""
    return one_at_a_time() or jax.default_backend() == "gpu"


def compiler_options(mesh: Mesh) -> dict[str, int | bool]:
    """What `jax.jit` tells the compiler of the mesh's devices."""
    if mesh.devices.flat[0].platform != "gpu":
        return {}
    return {
        # Or XLA makes one product of those that read the same array, as wide as they are together,
        # and copies out of it. Where that pays, the layers do it themselves.
        "xla_gpu_dot_merger_threshold_mb": 0,
        # On an H200 nearly every product went to cuBLAS after Triton's kernels were tried, but
        # without the sum or the bias that it adds for nothing.
        "xla_gpu_enable_triton_gemm": False,
    }


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
    return place(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def place(tree: Any, shardings: Any) -> Any:
    """A tree of whole host arrays as global arrays, each device with its part; see `replicate`."""

    def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(one, tree, shardings)


def lying(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes and dtypes, each with a sharding; `shardings` is one, or a tree of them."""

    def one(sharding: NamedSharding, part: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part
        )

    return jax.tree.map(one, shardings, shapes)
