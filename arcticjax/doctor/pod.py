"""What the processes of a run can only find out together: devices, mesh, network, clocks, disk."""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from arcticjax.config import RunConfig
from arcticjax.doctor import machine
from arcticjax.doctor.findings import Finding
from arcticjax.errors import ConfigError, PeerLost
from arcticjax.parallel import distributed, fingerprint
from arcticjax.parallel import mesh as meshes
from arcticjax.step import program as programs

# Of one device's part in the all-gather.
_PART_FLOATS = 1 << 16
_PATIENCE_SECONDS = 120.0
# Fields in which processes may differ: where each finds its files and how it reads them.
_OWN = {"run": {"directory"}, "data": {"cache", "threads", "prefetch"}}


def devices(platform: str, policy: str) -> Finding | str:
    """Starts jax as a run would, joining the other processes, and counts what is there."""
    cluster = distributed.detect(os.environ)
    distributed.start(platform, policy)
    found = jax.devices()
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ConfigError(
            f"the devices belong to {jax.process_count()} processes, but nothing told this one how "
            "to reach the others; start the run by launch.tpu_vm, or set ARCTICJAX_COORDINATOR, "
            "ARCTICJAX_PROCESSES and ARCTICJAX_PROCESS (docs/launching.md)"
        )
    kind = found[0].device_kind
    text = f"{len(found)} x {kind} ({found[0].platform})"
    if cluster is not None:
        text += (
            f", {len(jax.local_devices())} of them here; {jax.process_count()} processes, started "
            f"by {cluster.kind}"
        )
    memory = meshes.device_memory()
    if memory is not None and found[0].platform != "cpu":
        text += f"; {memory / 2**30:.2f} GiB each"
    if platform not in ("auto", found[0].platform):
        return Finding(
            "devices", "warn", f"{text}, not {platform}", "mesh.policy: required makes this fail"
        )
    return text


def make_mesh(config: RunConfig | None) -> tuple[Mesh, str]:
    """The mesh that a run would use, and how it reads; without a config, all devices."""
    if config is None:
        mesh = meshes.make_mesh()
    else:
        mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.slices)
        programs.check_global_batch(config.train.global_batch, mesh.devices.size)
    text = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    if config is not None:
        pairs = config.train.global_batch // mesh.devices.size
        text += f"; {pairs} of {config.train.global_batch} pairs on each device"
    return mesh, text


def alike(config: RunConfig | None) -> str:
    """Whether all processes have the same config, code, packages and devices."""
    if jax.process_count() == 1:
        return "one process"

    def values() -> dict[str, object]:
        local = jax.local_devices()
        fields = {} if config is None else config.model_dump(exclude=_OWN)
        return {
            **fields,
            "code": fingerprint.code_version(),
            "devices": f"{len(local)} x {local[0].device_kind}",
        }

    fingerprint.check("doctor", values, patience_seconds=_PATIENCE_SECONDS)
    return f"{jax.process_count()} processes with the same config, code and devices"


def all_gather(mesh: Mesh) -> Finding:
    """Gathers a small array from every device on every device, and times it."""
    count = mesh.devices.size

    def body(part_1f: jax.Array) -> jax.Array:
        gathered_Nf = meshes.gather(part_1f)
        # Weighted, so that parts in a wrong order do not pass.
        return jnp.sum(gathered_Nf[:, 0] * jnp.arange(count, dtype=jnp.float32))[None]

    program = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=meshes.BATCH, out_specs=meshes.BATCH))
    positions = np.array(meshes.local_positions(mesh), np.float32)
    parts = meshes.host_to_global(
        mesh, np.repeat(positions[:, None], _PART_FLOATS, axis=1).astype(np.float32)
    )
    jax.block_until_ready(program(parts))  # compiles
    began = time.perf_counter()
    sums = jax.block_until_ready(program(parts))
    took = time.perf_counter() - began
    expected = np.float32(np.sum(np.arange(count, dtype=np.float64) ** 2))
    for shard in sums.addressable_shards:
        got = float(np.asarray(shard.data)[0])
        if not np.isclose(got, expected, rtol=1e-5):
            raise ConfigError(
                f"{shard.device} gathered {got:g} where {expected:g} was sent: a device or the "
                "network between devices is faulty; take other machines"
            )
    moved = _PART_FLOATS * 4 * (count - 1)
    found = f"{count} devices, {moved / 2**20:.2f} MiB to each in {1000 * took:.2f} ms"
    return Finding("all-gather", "ok", found, seconds=took)


def clocks() -> Finding | str:
    """Whether this process's clock agrees with that of process 0."""
    client = distributed.coordination_service()
    client.wait_at_barrier("arcticjax/doctor/clock", timeout_in_ms=int(1000 * _PATIENCE_SECONDS))
    now = time.time()
    first = float(exchange("clock", repr(now))[0])
    return machine.judge_skew("clock", first - now, "process 0's")


def shared(directory: Path) -> str:
    """Whether what process 0 writes near the run's directory is seen by every process."""
    name = f".doctor-{uuid.uuid4().hex}"
    place = machine.nearest(directory)
    if jax.process_index() == 0:
        (place / name).touch()
    try:
        told = exchange("shared", json.dumps([str(directory), name]))
        seen = (place / json.loads(told[0])[1]).exists()
        exchange("shared seen", "")
    finally:
        if jax.process_index() == 0:
            (place / name).unlink(missing_ok=True)
    if not seen:
        raise ConfigError(
            f"run.directory {directory}: what process 0 writes there is not seen by this one; all "
            "processes need a directory on a disk that they share (docs/launching.md)"
        )
    return f"{directory} is seen by all processes"


def exchange(name: str, text: str) -> list[str]:
    """Every process's text in process order, by way of the service that processes start by; all
    must call it, once for each name. PeerLost where one does not."""
    if jax.process_count() == 1:
        return [text]
    client, folder = distributed.coordination_service(), f"arcticjax/doctor/{name}"
    client.key_value_set(f"{folder}/{jax.process_index()}", text)
    answers = []
    for process in range(jax.process_count()):
        try:
            answers.append(
                client.blocking_key_value_get(f"{folder}/{process}", int(1000 * _PATIENCE_SECONDS))
            )
        except jax.errors.JaxRuntimeError as problem:
            raise PeerLost(
                f"{name}: process {process} did not come within {_PATIENCE_SECONDS:g} s; its "
                "output says why"
            ) from problem
    return answers


def all_agree(name: str, good: bool) -> bool:
    """Whether `good` holds on every process; to be asked before what needs all of them."""
    return all(answer == "1" for answer in exchange(name, "1" if good else "0"))
