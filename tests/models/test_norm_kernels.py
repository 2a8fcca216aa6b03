"""The norm's kernels, interpreted, against the norm that XLA compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from arcticjax.models import norm, norm_kernels

EPSILON = 1e-5


def given(width, rows, count, with_bias=True, with_shift=True, dtype=jnp.bfloat16):
    keys = iter(jax.random.split(jax.random.key(0), 8))
    parts = tuple(
        (3 + jax.random.normal(next(keys), (*rows, width))).astype(dtype) for _ in range(count)
    )
    bias, scale, shift = (jax.random.normal(next(keys), (width,)) for _ in range(3))
    return parts, bias if with_bias else None, scale, shift if with_shift else None


def close(found, wanted):
    """Within a rounding of their dtype: sums are taken in another order."""
    found, wanted = (np.asarray(one, np.float32) for one in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=8e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("width", "count", "with_bias", "with_shift"),
    [(384, 2, True, True), (64, 1, False, False)],
)
def test_kernels_equal_the_plain_norm(width, count, with_bias, with_shift):
    some = given(width, (2, 16), count, with_bias, with_shift)
    dtype = jnp.bfloat16
    normal, mean, inverse = norm_kernels.forward(*some, EPSILON, dtype, interpret=True)
    wanted, wanted_mean, wanted_inverse = norm._normalize(*some, epsilon=EPSILON, dtype=dtype)
    assert normal.dtype == dtype
    close(normal, wanted)
    np.testing.assert_allclose(mean, wanted_mean, rtol=1e-6)
    np.testing.assert_allclose(inverse, wanted_inverse, rtol=1e-5)

    parts, bias, scale, _ = some
    direction = jax.random.normal(jax.random.key(1), normal.shape, dtype)
    rest = parts, bias, scale, mean, inverse, direction
    found = norm_kernels.backward(*rest, interpret=True)
    plain = norm._gradients(*rest)
    assert jax.tree.structure(found) == jax.tree.structure(plain)
    assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, plain)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        close(one, other)


def test_sums_over_several_blocks():
    """The gradients of bias, scale and shift are of all rows, not of one block's."""
    (parts, bias, scale, _), rows = given(128, (4, 16), 1), 64
    some = parts, bias, scale, jnp.zeros(rows), jnp.ones(rows), jnp.ones_like(parts[0])
    of_shift = norm_kernels.backward(*some, interpret=True)[3]
    np.testing.assert_array_equal(of_shift, np.full(128, rows, np.float32))


@pytest.mark.parametrize(
    ("rows", "width", "fits"),
    [(128, 384, True), (128, 1024, True), (128, 96, False), (72, 384, False)],
)
def test_what_fits(rows, width, fits):
    assert norm_kernels.fits(rows, width) == fits


@pytest.mark.parametrize(
    ("dtype", "platform", "kernels"),
    [("bfloat16", "cuda", 2), ("bfloat16", "cpu", 0), ("float32", "cuda", 0)],
)
def test_they_are_what_a_gpu_runs(dtype, platform, kernels):
    parts, bias, scale, shift = given(128, (2, 16), 2, dtype=dtype)

    def value_and_pull(parts, bias, scale, shift):
        normal, pull = jax.vjp(
            lambda *some: norm.normalized_sum(*some, EPSILON, dtype), parts, bias, scale, shift
        )
        return pull(normal)

    # Which GPU it is, jax wants to know from 0.12 on.
    kind = AbstractDevice("NVIDIA H200", None, "gpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=kind)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(value_and_pull).trace(parts, bias, scale, shift)
        lowered = traced.lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("custom_call @") == kernels
