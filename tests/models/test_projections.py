"""Queries, keys and values: one wide product, or three alone for cuDNN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcticjax.models import layers
from arcticjax.models.spec import ModelSpec

SPEC = ModelSpec(
    vocab_size=9, hidden_size=32, num_layers=1, num_heads=4, intermediate_size=8, max_positions=8
)
SEGMENTS_RS = jnp.ones((1, 1), jnp.int32)  # for attention, which these tests leave out


@pytest.fixture(autouse=True)
def no_attention(monkeypatch):
    """What reaches attention goes through it, side by side."""

    def join(query, key, value, segments, implementation, reach):
        return query + 2 * key + 3 * value

    monkeypatch.setattr(layers, "attend", join)


def value_and_gradients(implementation, dtype, *, bias=True):
    module = layers.Attention(SPEC, nnx.Rngs(0), bias=bias)
    noise = iter(jax.random.split(jax.random.key(1), 20))
    graph, state = nnx.split(module)
    state = jax.tree.map(lambda one: one + 0.1 * jax.random.normal(next(noise), one.shape), state)
    x = jax.random.normal(jax.random.key(2), (20, 32, 32)).astype(dtype)

    def mixed(state, x):
        product, bias = nnx.merge(graph, state)(x, SEGMENTS_RS, implementation)
        return product.astype(jnp.float32) + (0 if bias is None else bias)

    value, pull = jax.vjp(mixed, state, x)
    return jax.tree.leaves((value, pull(jax.random.normal(next(noise), value.shape))))


@pytest.mark.parametrize(
    ("dtype", "bias", "tolerance"), [("float32", True, 1e-5), ("bfloat16", False, 2e-2)]
)
def test_three_products_equal_one(dtype, bias, tolerance):
    alone, together = (value_and_gradients(one, dtype, bias=bias) for one in ("cudnn", "xla"))
    assert [one.dtype for one in alone] == [one.dtype for one in together]
    for one, other in zip(alone, together, strict=True):
        one, other = (np.asarray(some, np.float32) for some in (one, other))
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


def test_the_gradient_of_a_bias_is_added_up_in_float32():
    """In bfloat16, 256 and 1 are 256."""
    module = layers.Attention(SPEC, nnx.Rngs(0))
    x = jnp.zeros((10, 64, 32), jnp.bfloat16)
    module.output.kernel[...] = jnp.eye(32)
    graph, state = nnx.split(module)
    gradients = jax.grad(lambda state: nnx.merge(graph, state)(x, SEGMENTS_RS, "cudnn")[0].sum())(
        state
    )
    np.testing.assert_array_equal(gradients["query"]["bias"][...], np.full(32, 640.0))
