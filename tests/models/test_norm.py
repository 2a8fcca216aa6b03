"""The norm of a sum against plain formulas, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcticjax.models.norm import normalized_sum

EPSILON = 1e-5


def plain(parts, bias, scale, shift):
    total = sum(part.astype(jnp.float32) for part in parts) + (0 if bias is None else bias)
    centred = total - total.mean(-1, keepdims=True)
    deviation = jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + EPSILON)
    return centred / deviation * scale + (0 if shift is None else shift)


def arrays(count, dtype=jnp.float32):
    keys = iter(jax.random.split(jax.random.key(0), 8))
    parts = tuple(
        (3 + jax.random.normal(next(keys), (2, 5, 16))).astype(dtype) for _ in range(count)
    )
    return parts, *(jax.random.normal(next(keys), (16,)) for _ in range(3))


@pytest.mark.parametrize(
    ("count", "with_bias", "with_shift"),
    [(1, False, True), (1, True, False), (2, True, True), (2, False, False)],
)
def test_value_and_gradients(count, with_bias, with_shift):
    parts, bias, scale, shift = arrays(count)
    given = parts, bias if with_bias else None, scale, shift if with_shift else None
    wanted, pull_wanted = jax.vjp(plain, *given)
    found, pull_found = jax.vjp(lambda *some: normalized_sum(*some, EPSILON, jnp.float32), *given)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    direction = jax.random.normal(jax.random.key(1), found.shape)
    for mine, theirs in zip(
        jax.tree.leaves(pull_found(direction)), jax.tree.leaves(pull_wanted(direction)), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_parts_in_bfloat16():
    """Statistics are float32 and only the results are rounded; gradients have their inputs'
    dtypes."""
    given = arrays(2, jnp.bfloat16)
    wanted, pull_wanted = jax.vjp(plain, *given)
    found, pull_found = jax.vjp(lambda *some: normalized_sum(*some, EPSILON, jnp.bfloat16), *given)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, wanted.astype(jnp.bfloat16))
    direction = jax.random.normal(jax.random.key(1), found.shape, jnp.bfloat16)
    mine, theirs = pull_found(direction), pull_wanted(direction.astype(jnp.float32))
    assert jax.tree.map(jnp.result_type, mine) == jax.tree.map(jnp.result_type, given)
    for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        one, other = (np.asarray(some, np.float32) for some in (one, other))
        assert np.linalg.norm(one - other) < 4e-3 * np.linalg.norm(other)


def test_a_large_mean_loses_no_digits():
    parts, bias, scale, shift = arrays(1)
    near = normalized_sum(parts, bias, scale, shift, EPSILON, jnp.float32)
    far = normalized_sum((parts[0] + 1000,), bias, scale, shift, EPSILON, jnp.float32)
    np.testing.assert_allclose(far, near, atol=2e-3)
