"""Layer normalisation of a sum, with its derivative written out.

What is normalised, its mean and its deviation are float32 whatever the dtypes. Of a row only mean
and deviation are kept, and the gradient of the sum leaves in the dtype of its parts: an array of
the states in float32 is never in memory, where autodiff leaves three.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from arcticjax.models.unchecked import without_check

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
    given = parts, bias, scale, shift
    normal, *statistics = _run("forward", _normalize, *given, epsilon=epsilon, dtype=dtype)
    # Without an axis of length 1, which would be padded on its way through memory.
    mean, inverse = (checkpoint_name(one, STATISTICS) for one in statistics)
    return normal, (*given, mean, inverse)


def _normalize(
    parts: tuple[Array, ...],
    bias: Array | None,
    scale: Array,
    shift: Array | None,
    epsilon: float,
    dtype: jax.typing.DTypeLike,
) -> tuple[Array, Array, Array]:
    """The normalised sum; of each row the mean and the inverse of the deviation."""
    total = _sum(parts, bias)
    mean = total.mean(-1)
    # two-pass variance: the one-pass form loses digits when the mean is large
    variance = jnp.square(total - mean[..., None]).mean(-1)
    inverse = jax.lax.rsqrt(variance + epsilon)
    normal = (total - mean[..., None]) * inverse[..., None] * scale
    normal = normal if shift is None else normal + shift
    return normal.astype(dtype), mean, inverse


def _backward(
    epsilon: float, dtype: jax.typing.DTypeLike, kept: tuple[Any, ...], wanted: Array
) -> tuple[Any, ...]:
    parts, bias, scale, shift, mean, inverse = kept
    of_parts, of_bias, of_scale, of_shift = _run(
        "backward", _gradients, parts, bias, scale, mean, inverse, wanted
    )
    return (
        of_parts,
        None if bias is None else of_bias,
        of_scale,
        None if shift is None else of_shift,
    )


normalized_sum.defvjp(_forward, _backward)


def _gradients(
    parts: tuple[Array, ...],
    bias: Array | None,
    scale: Array,
    mean: Array,
    inverse: Array,
    wanted: Array,
) -> tuple[tuple[Array, ...], Array, Array, Array]:
    """Of the parts, the bias, the scale and the shift."""
    wanted = wanted.astype(jnp.float32)
    normal = (_sum(parts, bias) - mean[..., None]) * inverse[..., None]
    scaled = wanted * scale
    along = (scaled * normal).mean(-1, keepdims=True)
    of_sum = inverse[..., None] * (scaled - scaled.mean(-1, keepdims=True) - normal * along)
    of_parts = tuple(_rounded(of_sum, part.dtype) for part in parts)
    # The bias's of what flows on, so that the unrounded gradient need not be there.
    of_bias = _columns(of_parts[-1].astype(jnp.float32))
    return of_parts, of_bias, _columns(wanted * normal), _columns(wanted)


def _run(
    kernel: str, plain: Callable[..., Any], parts: tuple[Array, ...], *rest: Any, **options: Any
) -> Any:
    """`plain`, or the kernel of that name where the program is for a GPU that has one for it."""
    *rows, width = parts[0].shape
    if any(part.dtype != jnp.bfloat16 for part in parts):
        return plain(parts, *rest, **options)
    from arcticjax.models import norm_kernels  # Pallas takes a quarter of a second to import

    if not norm_kernels.fits(math.prod(rows), width):
        return plain(parts, *rest, **options)
    choose = functools.partial(
        jax.lax.platform_dependent,
        cuda=functools.partial(getattr(norm_kernels, kernel), **options),
        default=functools.partial(plain, **options),
    )
    return without_check(choose, parts, *rest)


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
