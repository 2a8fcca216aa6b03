"""What scoring and mining compile: encoding without gradients, and search."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from arcticjax.data import layout
from arcticjax.models.encoder import Encoder
from arcticjax.models.spec import ModelSpec
from arcticjax.parallel import mesh as meshes
from arcticjax.plan.compile import Compiled, compile_program
from arcticjax.step import search
from arcticjax.step.embedder import ROWS
from arcticjax.step.encode import make_encode


def compile_encode(
    spec: ModelSpec, mesh: Mesh, row_length: int, precision: str
) -> tuple[dict[str, Any], Compiled]:
    """The program that embeds texts, as `compiled_shapes` lists it, and what it needs."""
    devices, cut = mesh.devices.size, meshes.batch_sharding(mesh)
    slots = row_length // layout.TOKENS_PER_SLOT

    def rows(last: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((devices, ROWS, last), jnp.int32, sharding=cut)

    encoder = Encoder(spec)
    params = meshes.lying(encoder.abstract(), meshes.replicated(mesh))
    arguments = (params, rows(row_length), rows(slots), rows(slots))
    encode = make_encode(encoder, mesh, pooling=spec.pooling, dtype=jnp.dtype(precision))
    done = compile_program("encode", encode.lower(*arguments), arguments)
    sizes = {"devices": devices, "rows": ROWS, "row_length": row_length, "precision": precision}
    return {"program": "encode", **sizes}, done


def compile_search(
    label: str, mesh: Mesh, width: int, queries: int, share: int, tile: int, k: int
) -> Compiled:
    """The program that finds the k nearest of `share` documents a device, for at most so many
    queries at once."""
    cut, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    block = min(search.QUERY_BLOCK, layout.round_up(queries, 8))
    arguments = (
        jax.ShapeDtypeStruct((block, width), jnp.float32, sharding=whole),
        jax.ShapeDtypeStruct((mesh.devices.size, share, width), jnp.float32, sharding=cut),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    )
    lowered = search.make_search(mesh, k, tile).lower(*arguments)
    return compile_program(label, lowered, arguments)


def entry(named: dict[str, Any], done: Compiled, resident: int = 0) -> dict[str, Any]:
    """A program as `compiled_shapes` lists it, with its memory. resident: bytes of a device that
    are taken while it runs and that it does not speak of."""
    memory = {"memory_bytes": done.memory_bytes, "compile_seconds": round(done.seconds, 1)}
    if resident:
        memory["memory_in_run_bytes"] = done.memory_bytes + resident
    if done.refused is not None:
        return {**named, **memory, "refused": done.refused}
    return {**named, **memory}


def needed(programs: list[dict[str, Any]]) -> int:
    """Bytes of a device that the largest of these programs takes in a run."""
    return max((one.get("memory_in_run_bytes", one["memory_bytes"]) for one in programs), default=0)
