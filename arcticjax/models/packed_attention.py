"""Attention within the texts of packed rows as Pallas kernels for NVIDIA GPUs.

A block of queries meets only those blocks of keys in which one of its texts has a token: in rows of
256 with three texts half of the scores are never computed, and no mask of S x S is read. The scores
of a block stay in registers, and the backward pass computes them again, once for the queries and
once for the keys and values (as in FlashAttention, Dao et al., arXiv 2205.14135).
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from arcticjax.models import looped
from arcticjax.models.precision import MASKED
from arcticjax.models.unchecked import without_check

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

# Queries and keys of a block. Rows are a multiple of it.
BLOCK = 64
# Warps of a program, and blocks on their way from memory at a time.
_WARPS, _STAGES = 4, 3
# Scores are kept as powers of 2, which the hardware has an instruction for.
_LOG2_E = math.log2(math.e)


@jax.custom_vjp
def attend(
    query_RSHK: Float[Array, "R S H K"],
    key_RSHK: Float[Array, "R S H K"],
    value_RSHK: Float[Array, "R S H K"],
    segments_RS: Int[Array, "R S"],
    reach: Int[Array, ""] | None = None,
) -> Float[Array, "R S H K"]:
    """Attention within segments, to tokens up to `reach` places away; the tokens of a text lie
    side by side, S is a multiple of `BLOCK`, K a power of two from 16 on."""
    return _forward(query_RSHK, key_RSHK, value_RSHK, segments_RS, reach)[0]


def _forward(
    query_RSHK: Array,
    key_RSHK: Array,
    value_RSHK: Array,
    segments_RS: Array,
    reach: Array | None,
) -> tuple[Array, Any]:
    def run(seen: tuple[Array, Array], *arrays: Array) -> tuple[Array, ...]:
        return _call(_mix, 1, seen, arrays)

    arrays = query_RSHK, key_RSHK, value_RSHK
    seen = _seen(segments_RS, reach)
    mixed_RSHK, log_total_RHS = without_check(run, seen, *arrays)
    mixed_RSHK = checkpoint_name(mixed_RSHK, looped.MIXED)
    log_total_RHS = checkpoint_name(log_total_RHS, looped.STATISTICS)
    return mixed_RSHK, (*arrays, mixed_RSHK, log_total_RHS, seen)


def _backward(kept: tuple[Any, ...], wanted_RSHK: Array) -> tuple[Any, ...]:
    *arrays, mixed_RSHK, log_total_RHS, seen = kept

    def run(
        seen: Any, log_total_RHS: Array, mixed_RSHK: Array, wanted_RSHK: Array, *arrays: Array
    ) -> tuple[Array, ...]:
        products_RSHK = wanted_RSHK.astype(jnp.float32) * mixed_RSHK.astype(jnp.float32)
        statistics = log_total_RHS, products_RSHK.sum(-1).swapaxes(1, 2)
        given = (*arrays, wanted_RSHK), *statistics
        (of_query,) = _call(_differentiate_queries, 1, seen, *given)
        return of_query, *_call(_differentiate_keys, 2, seen, *given)

    gradients = without_check(run, seen, log_total_RHS, mixed_RSHK, wanted_RSHK, *arrays)
    return (*gradients, None, None)


attend.defvjp(_forward, _backward)


def _seen(segments_RS: Array, reach: Array | None) -> tuple[Array, Array]:
    """For every token the first that it sees and the first after those, [R, S] each; a token of
    padding, which may lie between texts, sees itself."""
    places_S = jnp.arange(segments_RS.shape[1], dtype=jnp.int32)
    same_RST = segments_RS[:, :, None] == segments_RS[:, None, :]
    text_RS = segments_RS > 0
    first_RS = jnp.where(same_RST, places_S, segments_RS.shape[1]).min(-1)
    first_RS = jnp.where(text_RS, first_RS, places_S)
    end_RS = jnp.where(same_RST, places_S, -1).max(-1) + 1
    end_RS = jnp.where(text_RS, end_RS, places_S + 1)
    if reach is not None:
        first_RS = jnp.maximum(first_RS, places_S - reach)
        end_RS = jnp.minimum(end_RS, places_S + reach + 1)
    return first_RS, end_RS


def _call(
    kernel: Any,
    results: int,
    seen: tuple[Array, Array],
    arrays: tuple[Array, ...],
    *statistics_RHS: Array,
) -> tuple[Array, ...]:
    """Calls the kernel for every row, head and block of tokens, with references to what belongs to
    row and head, [S, ...], and to its block of so many results like `arrays`; the forward pass has
    one statistic more."""
    rows, length, heads, size = arrays[0].shape
    of_row = pl.BlockSpec((None, length), lambda r, h, b: (r, 0))
    of_head = pl.BlockSpec((None, length, None, size), lambda r, h, b: (r, 0, h, 0))
    statistic_of_head = pl.BlockSpec((None, None, length), lambda r, h, b: (r, h, 0))
    of_block = pl.BlockSpec((None, BLOCK, None, size), lambda r, h, b: (r, b, h, 0))
    statistic_of_block = pl.BlockSpec((None, None, BLOCK), lambda r, h, b: (r, h, b))
    result = jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)
    statistic = jax.ShapeDtypeStruct((rows, heads, length), jnp.float32)
    more = 0 if statistics_RHS else 1
    return pl.pallas_call(
        functools.partial(kernel, scale=_LOG2_E / math.sqrt(size)),
        grid=(rows, heads, length // BLOCK),
        in_specs=[
            *[of_row] * 2,
            *[of_head] * len(arrays),
            *[statistic_of_head] * len(statistics_RHS),
        ],
        out_specs=[*[of_block] * results, *[statistic_of_block] * more],
        out_shape=[*[result] * results, *[statistic] * more],
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        name=f"attention{kernel.__name__}",
    )(*seen, *arrays, *statistics_RHS)


def _mix(
    first: Any, end: Any, query: Any, key: Any, value: Any, mixed: Any, log: Any, *, scale: float
) -> None:
    """What a block of queries attends to, [S, K], and the logarithm (base 2) of their sums, [S]."""
    here = pl.ds(pl.program_id(2) * BLOCK, BLOCK)
    first_S, end_S, query_SK = first[here], end[here], query[here, :]

    def turn(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mixed_SK, highest_S, total_S = carry
        there = pl.ds(block * BLOCK, BLOCK)
        scores_ST = _scores(query_SK, key[there, :], first_S, end_S, block, scale)
        # Where no key of a block is seen, weights are 1 until one that is makes them 0.
        now_S = jnp.maximum(highest_S, scores_ST.max(1))
        weights_ST, faded_S = jnp.exp2(scores_ST - now_S[:, None]), jnp.exp2(highest_S - now_S)
        mixed_SK = mixed_SK * faded_S[:, None] + _product(weights_ST, value[there, :])
        return mixed_SK, now_S, total_S * faded_S + weights_ST.sum(1)

    zeros_S = jnp.zeros(BLOCK, jnp.float32)
    start = jnp.zeros(query_SK.shape, jnp.float32), zeros_S + MASKED, zeros_S
    mixed_SK, highest_S, total_S = lax.fori_loop(*_blocks(first_S, end_S), turn, start)
    mixed[...] = (mixed_SK / total_S[:, None]).astype(mixed.dtype)
    log[...] = highest_S + jnp.log2(total_S)


def _differentiate_queries(
    first: Any,
    end: Any,
    query: Any,
    key: Any,
    value: Any,
    wanted: Any,
    log: Any,
    mean: Any,
    of_query: Any,
    *,
    scale: float,
) -> None:
    """The gradient of a block of queries."""
    here = pl.ds(pl.program_id(2) * BLOCK, BLOCK)
    first_S, end_S, log_S, mean_S = (array[here] for array in (first, end, log, mean))
    query_SK, wanted_SK = query[here, :], wanted[here, :]

    def turn(block: Array, of_query_SK: Array) -> Array:
        there = pl.ds(block * BLOCK, BLOCK)
        key_TK = key[there, :]
        scores_ST = _scores(query_SK, key_TK, first_S, end_S, block, scale)
        weights_ST = jnp.exp2(scores_ST - log_S[:, None])
        of_scores_ST = weights_ST * (_transposed(wanted_SK, value[there, :]) - mean_S[:, None])
        return of_query_SK + _product(of_scores_ST, key_TK)

    zeros_SK = jnp.zeros(query_SK.shape, jnp.float32)
    found_SK = lax.fori_loop(*_blocks(first_S, end_S), turn, zeros_SK)
    of_query[...] = (found_SK * (scale / _LOG2_E)).astype(of_query.dtype)


def _differentiate_keys(
    first: Any,
    end: Any,
    query: Any,
    key: Any,
    value: Any,
    wanted: Any,
    log: Any,
    mean: Any,
    of_key: Any,
    of_value: Any,
    *,
    scale: float,
) -> None:
    """The gradients of a block of keys and values; a token sees whoever sees it."""
    here = pl.ds(pl.program_id(2) * BLOCK, BLOCK)
    first_S, end_S, key_SK, value_SK = first[here], end[here], key[here, :], value[here, :]

    def turn(block: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        of_key_SK, of_value_SK = carry
        there = pl.ds(block * BLOCK, BLOCK)
        query_TK, wanted_TK = query[there, :], wanted[there, :]
        scores_ST = _scores(key_SK, query_TK, first_S, end_S, block, scale)
        weights_ST = jnp.exp2(scores_ST - log[there][None, :])
        of_scores_ST = weights_ST * (_transposed(value_SK, wanted_TK) - mean[there][None, :])
        return (
            of_key_SK + _product(of_scores_ST, query_TK),
            of_value_SK + _product(weights_ST, wanted_TK),
        )

    zeros_SK = jnp.zeros(key_SK.shape, jnp.float32)
    of_key_SK, of_value_SK = lax.fori_loop(*_blocks(first_S, end_S), turn, (zeros_SK, zeros_SK))
    of_key[...] = (of_key_SK * (scale / _LOG2_E)).astype(of_key.dtype)
    of_value[...] = of_value_SK.astype(of_value.dtype)


def _blocks(first_S: Array, end_S: Array) -> tuple[Array, Array]:
    """The first block with a token that one of these sees, and the first after the last such."""
    return first_S.min() // BLOCK, (end_S.max() + BLOCK - 1) // BLOCK


def _scores(
    left_SK: Array, right_TK: Array, first_S: Array, end_S: Array, block: Array, scale: float
) -> Array:
    """Scores of tokens with those of a block, to the base 2; masked where they are not seen."""
    places_1T = (block * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32))[None, :]
    seen_ST = (places_1T >= first_S[:, None]) & (places_1T < end_S[:, None])
    return jnp.where(seen_ST, _transposed(left_SK, right_TK) * scale, MASKED)


def _product(left_ST: Array, right_TK: Array) -> Array:
    return jnp.dot(left_ST.astype(right_TK.dtype), right_TK, preferred_element_type=jnp.float32)


def _transposed(left_SK: Array, right_TK: Array) -> Array:
    """The product of the left with the transposed right, [S, T]."""
    along_both = (((1,), (1,)), ((), ()))
    return lax.dot_general(left_SK, right_TK, along_both, preferred_element_type=jnp.float32)
