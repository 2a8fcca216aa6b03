"""The exact (erf) GELU in a form that XLA computes fast, with an analytic derivative."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# The upper tail of the normal distribution, Q(a) = erfc(a / sqrt 2) / 2 for a >= 0, in the form of
# Abramowitz & Stegun 7.1.28, Q(a) = p(a)^-8 / 2. These coefficients of p, constant first, are a
# minimax fit on [0, 6] of that form with degree 8, weighted by max(a, 1/2): max error 5.6e-8.
# Its errors are relative and Q falls faster than a grows: an erf near 1 would lose digits there.
_TAIL = (
    1.0,
    0.09973445240360518,
    0.044775527651697344,
    0.008624819190335146,
    0.0009396539160703896,
    0.00013896581647691414,
    8.730237178437381e-05,
    -1.476786993915375e-05,
    2.7791926145811223e-06,
)
# The derivative's name to rematerialisation policies.
GELU_SLOPE = "gelu slope"
_DENSITY_SCALE = np.float32(1 / math.sqrt(2 * math.pi))


@jax.custom_jvp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x * Phi(x) within 5e-7 of the erf form; its derivative within 6e-7.

    Computed in float32 and returned in the dtype of `x`. NaN stays NaN.
    """
    return _value(x.astype(jnp.float32), _tail(x.astype(jnp.float32), x.dtype)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple, tangents: tuple) -> tuple:
    (x,), (tangent,) = primals, tangents
    x32 = x.astype(jnp.float32)
    tail = _tail(x32, x.dtype)
    value = _value(x32, tail).astype(x.dtype)
    if x.dtype != jnp.float32:
        # One tail would serve both, but an accelerator needs them at different times, and a second
        # tail costs less there than an array in memory. XLA must not find that they are the same.
        tail = _tail(x32, x.dtype, jnp.maximum(x32, -x32))
    cumulative = jnp.where(x32 > 0, 1 - tail, tail)
    slope = cumulative + x32 * (_DENSITY_SCALE * jnp.exp(-0.5 * x32 * x32))
    slope = slope.astype(x.dtype)
    slope = checkpoint_name(slope, GELU_SLOPE)
    return value, tangent * slope


def _tail(
    x: Float[Array, "*shape"], dtype: jnp.dtype, distance: Float[Array, "*shape"] | None = None
) -> Float[Array, "*shape"]:
    distance = jnp.abs(x) if distance is None else distance
    polynomial = jnp.full_like(x, _TAIL[-1])
    for coefficient in _TAIL[-2::-1]:
        polynomial = polynomial * distance + np.float32(coefficient)
    if dtype == jnp.float32:
        return np.float32(0.5) / _squared(polynomial, 3)
    # Where the result is rounded to 8 bits anyway: accelerators have a fast, nearly exact root, and
    # no such division (on an H200 that was most of the GELU's time).
    return np.float32(0.5) * _squared(jax.lax.rsqrt(polynomial), 4)


def _squared(value: Float[Array, "*shape"], times: int) -> Float[Array, "*shape"]:
    for _ in range(times):
        value = value * value
    return value


def _value(x: Float[Array, "*shape"], tail: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.maximum(x, 0) - jnp.abs(x) * tail
