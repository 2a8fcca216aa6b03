"""The splash attention kernel of jax (Pallas, TPU) on packed rows.

Segments go to the kernel as they are, padding as one of them, so that every token sees at least
itself. Beside segments nothing is masked: no block is left out, and rows are short enough that one
block usually is the whole row.

The kernel says nothing of the mesh axes along which its results vary: see
`arcticjax.models.unchecked`, which it needs in the forward and in the backward pass, and so a
derivative of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as pallas

from arcticjax.models.unchecked import without_check

LANES = 128
_LARGEST_BLOCK = 512


@jax.custom_vjp
def attend(
    scaled_RSHK: jax.Array, key_RSHK: jax.Array, value_RSHK: jax.Array, segments_RS: jax.Array
) -> jax.Array:
    """Attention within segments, [R, S, H, K], the queries already scaled; S is a multiple of
    `LANES`."""

    def run(segments_RS: jax.Array, *arrays_RSHK: jax.Array) -> jax.Array:
        return _swap(_by_head(segments_RS)(*map(_swap, arrays_RSHK)))

    return without_check(run, segments_RS, scaled_RSHK, key_RSHK, value_RSHK)


def _forward(
    scaled_RSHK: jax.Array, key_RSHK: jax.Array, value_RSHK: jax.Array, segments_RS: jax.Array
) -> tuple[jax.Array, Any]:
    def run(segments_RS: jax.Array, *arrays_RSHK: jax.Array) -> tuple[jax.Array, Any]:
        # What is differentiated must not be an argument itself: arguments are typed as varying
        # over the mesh, results of the kernel are not. Whatever is computed in here is neither.
        mixed_RHSK, pull = jax.vjp(_by_head(segments_RS), *map(_swap, arrays_RSHK))
        return _swap(mixed_RHSK), pull

    return without_check(run, segments_RS, scaled_RSHK, key_RSHK, value_RSHK)


def _backward(pull: Any, gradient_RSHK: jax.Array) -> tuple[Any, ...]:
    def run(pull: Any, gradient_RSHK: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(_swap(one) for one in pull(_swap(gradient_RSHK)))

    return (*without_check(run, pull, gradient_RSHK), None)


attend.defvjp(_forward, _backward)


def _by_head(segments_RS: jax.Array) -> Callable[..., jax.Array]:
    """The kernel for these segments: three arrays [R, H, S, K] to one."""

    def run(scaled_RHSK: jax.Array, key_RHSK: jax.Array, value_RHSK: jax.Array) -> jax.Array:
        heads, length = scaled_RHSK.shape[1:3]
        block = _block(length)
        # Tokens along the 128 lanes: heads of 32 or 64 would be padded to 128 in memory.
        layout = pallas.QKVLayout.SEQ_MINOR
        kernel = pallas.make_splash_mha(
            pallas.MultiHeadMask([pallas.FullMask((length, length))] * heads),
            block_sizes=pallas.BlockSizes(
                block_q=block,
                block_kv=block,
                block_q_dkv=block,
                block_kv_dkv=block,
                use_fused_bwd_kernel=True,  # five products instead of seven
                q_layout=layout,
                k_layout=layout,
                v_layout=layout,
            ),
            head_shards=1,
            q_seq_shards=1,
        )
        ids = pallas.SegmentIds(segments_RS, segments_RS)
        mixed_RHSK: Any = jax.vmap(kernel)(scaled_RHSK, key_RHSK, value_RHSK, ids)
        return mixed_RHSK

    return run


def _block(length: int) -> int:
    """Tokens of a block: the largest multiple of `LANES` that divides the row, up to 512."""
    return max(size for size in range(LANES, _LARGEST_BLOCK + 1, LANES) if length % size == 0)


def _swap(array_RSHK: jax.Array) -> jax.Array:
    return jnp.swapaxes(array_RSHK, 1, 2)
