"""Layer normalisation of a sum, with its derivative written out.

What is normalised, its mean and its deviation are float32 whatever the dtypes. Of a row only mean
and deviation are kept, and the gradient of the sum leaves in the dtype of its parts: an array of
the states in float32 is never in memory, where autodiff leaves three.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# To rematerialisation policies: mean and deviation of every row.
STATISTICS = "norm statistics"


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def normalized_sum(
    parts: tuple[Float[Array, "... D"], ...],
    bias: Float[Array, " D"] | None,
    scale: Float[Array, " D"],
    shift: Float[Array, " D"] | None,
    epsilon: float,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "... D"]:
    """scale * (s - mean(s)) / sqrt(variance(s) + epsilon) + shift in `dtype`, for s the sum of the
    parts and the bias; mean and variance over the last axis."""
    return _forward(parts, bias, scale, shift, epsilon, dtype)[0]


def _forward(
    parts: tuple[Array, ...],
    bias: Array | None,
    scale: Array,
    shift: Array | None,
    epsilon: float,
    dtype: jax.typing.DTypeLike,
) -> tuple[Array, Any]:
    total = _sum(parts, bias)
    # An axis of length 1 would be padded on its way through memory.
    mean = checkpoint_name(total.mean(-1), STATISTICS)[..., None]
    # two-pass variance: the one-pass form loses digits when the mean is large
    variance = jnp.square(total - mean).mean(-1)
    inverse = checkpoint_name(jax.lax.rsqrt(variance + epsilon), STATISTICS)[..., None]
    normal = (total - mean) * inverse * scale
    normal = normal if shift is None else normal + shift
    return normal.astype(dtype), (parts, bias, scale, shift, mean, inverse)


def _backward(
    epsilon: float, dtype: jax.typing.DTypeLike, kept: tuple[Any, ...], wanted: Array
) -> tuple[Any, ...]:
    parts, bias, scale, shift, mean, inverse = kept
    wanted = wanted.astype(jnp.float32)
    normal = (_sum(parts, bias) - mean) * inverse
    scaled = wanted * scale
    along = (scaled * normal).mean(-1, keepdims=True)
    of_sum = inverse * (scaled - scaled.mean(-1, keepdims=True) - normal * along)
    of_parts = tuple(_rounded(of_sum, part.dtype) for part in parts)
    # Of what flows on, so that the unrounded gradient need not be there.
    of_bias = None if bias is None else _columns(of_parts[-1].astype(jnp.float32))
    of_shift = None if shift is None else _columns(wanted)
    return of_parts, of_bias, _columns(wanted * normal), of_shift


normalized_sum.defvjp(_forward, _backward)


def _sum(parts: tuple[Array, ...], bias: Array | None) -> Array:
    total = functools.reduce(jnp.add, (part.astype(jnp.float32) for part in parts))
    return total if bias is None else total + bias


def _rounded(array: Array, dtype: Any) -> Array:
    # The barrier keeps XLA from reading the unrounded array instead, and so from writing it.
    if dtype == array.dtype:
        return array
    return jax.lax.optimization_barrier(array.astype(dtype))


def _columns(rows: Array) -> Array:
    return rows.sum(tuple(range(rows.ndim - 1)))
