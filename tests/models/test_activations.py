"""The fast GELU is the erf form, in value and derivative."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from arcticjax.models.activations import gelu

x_T = np.concatenate(
    [np.linspace(-12, 12, 240_001), [-1e4, -100.0, -30.0, 30.0, 100.0, 0.0, -0.0, 1e-30]]
).astype(np.float32)
x64_T = x_T.astype(np.float64)
cumulative_T = 0.5 * np.vectorize(math.erfc)(-x64_T / math.sqrt(2))
density_T = np.exp(-(x64_T**2) / 2) / math.sqrt(2 * math.pi)


def derivative(x_T: jax.Array) -> jax.Array:
    return jax.vjp(gelu, x_T)[1](jnp.ones_like(x_T))[0]


def test_value_against_float64():
    error_T = np.abs(np.asarray(jax.jit(gelu)(x_T), np.float64) - x64_T * cumulative_T)
    assert error_T.max() < 5e-7


def test_value_against_the_float32_erf_form():
    stock_T = jax.jit(lambda x_T: jax.nn.gelu(x_T, approximate=False))(x_T)
    assert np.abs(np.asarray(jax.jit(gelu)(x_T)) - np.asarray(stock_T)).max() < 1e-6


def test_derivative_against_float64():
    got_T = np.asarray(jax.jit(derivative)(x_T), np.float64)
    assert np.abs(got_T - (cumulative_T + x64_T * density_T)).max() < 6e-7


def test_bfloat16_is_the_rounded_value():
    x_S = jnp.linspace(-6, 6, 2001, dtype=jnp.bfloat16)
    assert gelu(x_S).dtype == derivative(x_S).dtype == jnp.bfloat16
    exact_S = gelu(x_S.astype(jnp.float32))
    np.testing.assert_array_equal(gelu(x_S), exact_S.astype(jnp.bfloat16))


def test_a_nan_is_not_hidden():
    bad = jnp.array([math.nan, 1.0])
    assert jnp.isnan(gelu(bad)).tolist() == jnp.isnan(derivative(bad)).tolist() == [True, False]
