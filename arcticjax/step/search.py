"""Exact nearest neighbours by inner product, documents cut over the mesh and scored in tiles."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from arcticjax.data.layout import round_up
from arcticjax.parallel.mesh import (
    AXES,
    BATCH,
    REPLICATED,
    host_to_global,
    local_positions,
    one_at_a_time,
    replicate,
    replicated,
)

# Queries scored at once, and documents in a tile.
QUERY_BLOCK = 512
TILE = 4096
FLOAT_BYTES = 4


def inner_products(queries_BD: jax.Array, documents_TD: jax.Array) -> jax.Array:
    """Scores float32 [B, T] of float32 vectors."""
    return jnp.matmul(
        queries_BD,
        documents_TD.T,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


Score = Callable[[jax.Array, jax.Array], jax.Array]


def search(
    queries_QD: np.ndarray,
    documents_TD: np.ndarray,
    k: int,
    mesh: Mesh,
    *,
    query_block: int = QUERY_BLOCK,
    tile: int = TILE,
    score: Score = inner_products,
) -> tuple[np.ndarray, np.ndarray]:
    """The k documents of highest inner product for each query.

    Returns scores float32 [Q, min(k, T)], descending, and document indices int32 of the same shape;
    documents of equal score come in the order of their indices. Memory beside the documents:
    query_block x tile scores a device. Every process gives the same arrays and gets the whole
    answer. `score` gives other scores than the inner product, of float32 or int32, of arrays of any
    one type; it is a function of a module, since programs are kept by it.
    """
    total = len(documents_TD)
    if not (len(queries_QD) and total and k):
        found = len(queries_QD), min(k, total)
        return np.zeros(found, np.float32), np.zeros(found, np.int32)
    sizes = shapes(len(queries_QD), total, k, mesh.devices.size, query_block=query_block, tile=tile)
    query_block, share, tile, k = (
        sizes[name] for name in ("queries", "documents_per_device", "tile", "top_k")
    )
    dtype = documents_TD.dtype if score is not inner_products else np.float32
    local = np.zeros((len(local_positions(mesh)), share, documents_TD.shape[1]), dtype)
    for part, position in zip(local, local_positions(mesh), strict=True):
        chunk = documents_TD[position * share : (position + 1) * share]
        part[: len(chunk)] = chunk
    documents = host_to_global(mesh, local)
    program = make_search(mesh, k, tile, score)

    answers = []
    for first in range(0, len(queries_QD), query_block):
        block = np.zeros((query_block, queries_QD.shape[1]), dtype)
        part = queries_QD[first : first + query_block]
        block[: len(part)] = part
        found = program(replicate(mesh, block), documents, np.int32(total))
        if one_at_a_time():
            jax.block_until_ready(found)
        answers.append((found, len(part)))
    scores = [np.asarray(found[0])[:used] for found, used in answers]
    indices = [np.asarray(found[1])[:used] for found, used in answers]
    return np.concatenate(scores), np.concatenate(indices)


def shapes(
    queries: int,
    documents: int,
    k: int,
    devices: int,
    *,
    query_block: int = QUERY_BLOCK,
    tile: int = TILE,
) -> dict[str, int]:
    """Sizes of the one program by which `search` answers so many queries, for announcements;
    `queries` is how many of them at once."""
    share, tile = cut_documents(documents, devices, tile)
    return {
        "queries": min(query_block, round_up(queries, 8)),
        "documents": documents,
        "documents_per_device": share,
        "tile": tile,
        "top_k": min(k, documents),
    }


def cut_documents(total: int, devices: int, tile: int = TILE) -> tuple[int, int]:
    """How `total` documents are cut: documents of a device, and of a tile at most `tile`."""
    share = -(-total // devices)
    tile = min(tile, round_up(share, 8))
    return round_up(share, tile), tile


def fitting(memory: int, dimension: int, devices: int) -> int:
    """Documents whose vectors take half of the devices' memory, `memory` bytes each."""
    return max(1, devices * (memory // 2) // (FLOAT_BYTES * dimension))


def cut_block(block: int, total: int, devices: int) -> tuple[int, int]:
    """Documents of a device, and of a tile, where `total` are searched `block` at a time.

    Both are those of a full block, so that all blocks share one program. The tile does not depend
    on devices or blocks: a score's last bit may depend on the product's shape.
    """
    tile = min(TILE, round_up(total, 8))
    return round_up(-(-block // devices), tile), tile


@functools.lru_cache(maxsize=32)
def make_search(mesh: Mesh, k: int, tile: int, score: Score = inner_products):
    """(queries [Q, D], documents [N, share, D], number of documents) -> scores and indices [Q, k];
    kept, because every evaluation of a run asks for the same program."""

    def on_device(queries_BD: jax.Array, documents: jax.Array, total: jax.Array):
        documents_TD = documents[0]
        share = len(documents_TD)
        device = jax.lax.axis_index(AXES)
        # A device may hold fewer than k documents; each keeps what it has.
        keep = min(k, share)
        dtype = jax.eval_shape(score, queries_BD, documents_TD).dtype
        integers = jnp.issubdtype(dtype, jnp.integer)
        lowest = jnp.array(jnp.iinfo(dtype).min if integers else -jnp.inf, dtype)

        def better(
            step: jax.Array, best: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            tile_TD = jax.lax.dynamic_slice_in_dim(documents_TD, step * tile, tile)
            scores_BT = score(queries_BD, tile_TD)
            indices = device * share + step * tile + jnp.arange(tile, dtype=jnp.int32)
            scores_BT = jnp.where(indices < total, scores_BT, lowest)
            # Earlier tiles stand first and top_k is stable: equal scores keep the order of their
            # indices.
            scores = jnp.concatenate([best[0], scores_BT], axis=1)
            places = jnp.concatenate([best[1], jnp.broadcast_to(indices, scores_BT.shape)], axis=1)
            scores, chosen = jax.lax.top_k(scores, keep)
            return scores, jnp.take_along_axis(places, chosen, axis=1)

        start = (
            jnp.full((len(queries_BD), keep), lowest, dtype),
            jnp.zeros((len(queries_BD), keep), jnp.int32),
        )
        start = jax.tree.map(lambda one: jax.lax.pcast(one, AXES, to="varying"), start)
        best = jax.lax.fori_loop(0, share // tile, better, start)
        # The query's k best of N times `keep`: devices stand in the order of their documents.
        scores, places = (jax.lax.all_gather(one, AXES, axis=1, tiled=True) for one in best)
        scores, chosen = jax.lax.top_k(scores, k)
        places = jnp.take_along_axis(places, chosen, axis=1)
        # Every device now holds the same values, which the type system cannot know: device 0's are
        # the answer.
        return scores[None], places[None]

    mapped = jax.shard_map(
        on_device, mesh=mesh, in_specs=(REPLICATED, BATCH, P()), out_specs=(BATCH, BATCH)
    )

    # Named as it is announced: logs of jax and profiles show it.
    def search(queries_BD: jax.Array, documents: jax.Array, total: jax.Array):
        scores, places = mapped(queries_BD, documents, total)
        return scores[0], places[0]

    return jax.jit(search, out_shardings=replicated(mesh))
