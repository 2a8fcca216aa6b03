"""Encoding without gradients: one compiled program from rows of texts to their vectors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from arcticjax.models import attention_choice
from arcticjax.models.encoder import Encoder
from arcticjax.models.spec import Pooling
from arcticjax.parallel.mesh import BATCH, REPLICATED, compiler_options, replicated


@functools.lru_cache(maxsize=8)
def make_encode(
    encoder: Encoder, mesh: Mesh, *, pooling: Pooling, dtype: Any = jnp.float32
) -> Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]:
    """(params, tokens [N, G, S], starts [N, G, K], lengths [N, G, K]) -> float32 [N, G, K, D],
    whole on every device.

    Embeddings have unit length; those of empty slots are zero. Kept, because an export embeds as
    the encoder and as the folder, which are one program where both are right.
    """

    # Named as it is announced: logs of jax and profiles show it.
    def encode(params: Any, tokens: jax.Array, starts: jax.Array, lengths: jax.Array) -> jax.Array:
        attention = attention_choice.choose(
            "auto",
            device=mesh.devices.flat[0],
            dtype=jnp.dtype(dtype).name,
            head_size=encoder.spec.head_size,
            row_length=tokens.shape[-1],
            windowed=encoder.spec.window is not None,
        )
        vectors = encoder.embed(
            params,
            tokens[0],
            starts[0],
            lengths[0],
            pooling=pooling,
            dtype=dtype,
            attention=attention,
        )
        return vectors[None]

    mapped = jax.shard_map(
        encode, mesh=mesh, in_specs=(REPLICATED, BATCH, BATCH, BATCH), out_specs=BATCH
    )
    # Every process reads every embedding: the partitioner adds the one all-gather that this takes.
    return jax.jit(mapped, out_shardings=replicated(mesh), compiler_options=compiler_options(mesh))
