"""Attention a head of a row at a time: for devices without a fused kernel, CPUs above all.

The scores of one head, S x S, stay in a core's cache, where those of a microbatch go through main
memory several times. The backward pass computes them again (as in FlashAttention, Dao et al., arXiv
2205.14135, without its blocks), so that nothing of S x S is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from arcticjax.models.precision import MASKED, matmul_precision

# Names to rematerialisation policies: what attention gives, and the log of each softmax's sum.
MIXED, STATISTICS = "attention mixed", "attention statistics"
# Heads of a row in one turn of the loop, so that one's small operations hide the other's.
_HEADS = 2


@jax.custom_vjp
def attend(
    scaled_RHSK: jax.Array,
    key_RHTK: jax.Array,
    value_RHTK: jax.Array,
    segments_RS: jax.Array,
    reach: jax.Array,
) -> jax.Array:
    """Attention within segments, [R, H, S, K] in the dtype of the values, to tokens up to `reach`
    places away; the queries already scaled, scores and softmax in float32."""
    return _forward(scaled_RHSK, key_RHTK, value_RHTK, segments_RS, reach)[0]


def _forward(
    scaled_RHSK: jax.Array,
    key_RHTK: jax.Array,
    value_RHTK: jax.Array,
    segments_RS: jax.Array,
    reach: jax.Array,
) -> tuple[jax.Array, Any]:
    def head(visible_ST: jax.Array, query_SK: jax.Array, key_TK: jax.Array, value_TK: jax.Array):
        scores_ST = jnp.where(visible_ST, _product(query_SK, key_TK.T), MASKED)
        highest_S1 = scores_ST.max(axis=-1, keepdims=True)
        weights_ST = jnp.exp(scores_ST - highest_S1)
        total_S1 = weights_ST.sum(axis=-1, keepdims=True)
        mixed_SK = _product(weights_ST.astype(value_TK.dtype), value_TK) / total_S1
        return mixed_SK.astype(value_TK.dtype), (highest_S1 + jnp.log(total_S1))[:, 0]

    arrays = (scaled_RHSK, key_RHTK, value_RHTK)
    mixed_RHSK, log_total_RHS = _each_head(head, segments_RS, reach, *arrays)
    mixed_RHSK = checkpoint_name(mixed_RHSK, MIXED)
    log_total_RHS = checkpoint_name(log_total_RHS, STATISTICS)
    return mixed_RHSK, (*arrays, mixed_RHSK, log_total_RHS, segments_RS, reach)


def _backward(kept: tuple[jax.Array, ...], gradient_RHSK: jax.Array) -> tuple[Any, ...]:
    *arrays, segments_RS, reach = kept

    def head(visible_ST, query_SK, key_TK, value_TK, mixed_SK, log_total_S, gradient_SK):
        dtype = value_TK.dtype
        # Keys along the first axis: of the five products one instead of two then has to turn an
        # S x S matrix. A token sees whoever sees it.
        scores_TS = jnp.where(visible_ST, _product(key_TK, query_SK.T), MASKED)
        weights_TS = jnp.exp(scores_TS - log_total_S)
        of_value_TK = _product(weights_TS.astype(dtype), gradient_SK)
        mean_S = (gradient_SK.astype(jnp.float32) * mixed_SK.astype(jnp.float32)).sum(axis=-1)
        of_scores_TS = weights_TS * (_product(value_TK, gradient_SK.T) - mean_S)
        of_scores_TS = of_scores_TS.astype(dtype)
        of_query_SK = _product(of_scores_TS.T, key_TK)
        of_key_TK = _product(of_scores_TS, query_SK)
        return tuple(one.astype(dtype) for one in (of_query_SK, of_key_TK, of_value_TK))

    gradients = _each_head(head, segments_RS, reach, *arrays, gradient_RHSK)
    return (*gradients, None, None)


attend.defvjp(_forward, _backward)


def _each_head(
    head: Callable[..., Any], segments_RS: jax.Array, reach: jax.Array, *arrays: jax.Array
) -> Any:
    """head(visible [S, S], a head of each array) over the first two axes, rows and heads."""
    places_S = jnp.arange(segments_RS.shape[1], dtype=jnp.int32)
    near_ST = jnp.abs(places_S[:, None] - places_S[None, :]) <= reach

    def row(own: tuple[jax.Array, ...]) -> Any:
        segments_S, *heads = own
        visible_ST = (segments_S[:, None] == segments_S[None, :]) & near_ST

        def turn(_: None, one: tuple[jax.Array, ...]) -> tuple[None, Any]:
            return None, head(visible_ST, *one)

        return jax.lax.scan(turn, None, tuple(heads), unroll=_HEADS)[1]

    return jax.lax.map(row, (segments_RS, *arrays))


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    precision = matmul_precision(left.dtype)
    return jnp.matmul(left, right, precision=precision, preferred_element_type=jnp.float32)
