"""Pooling and normalisation of packed texts, and what empty slots give."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcticjax.errors import ConfigError
from arcticjax.models.pooling import normalize, pool
from arcticjax.models.spec import POOLINGS

STARTS_RK = np.array([[0, 4, 12], [3, 12, 12], [12, 12, 12]], np.int32)
LENGTHS_RK = np.array([[4, 8, 0], [1, 0, 0], [0, 0, 0]], np.int32)
HIDDEN_RSD = np.random.default_rng(0).normal(size=(3, 12, 5)).astype(np.float32)


def by_hand(kind: str) -> np.ndarray:
    vectors_RKD = np.zeros((3, 3, 5))
    for row, slot in zip(*np.nonzero(LENGTHS_RK), strict=True):
        start, length = STARTS_RK[row, slot], LENGTHS_RK[row, slot]
        states = HIDDEN_RSD[row, start : start + length].astype(np.float64)
        vectors_RKD[row, slot] = {"cls": states[0], "last": states[-1], "mean": states.mean(0)}[
            kind
        ]
    return vectors_RKD


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", POOLINGS)
def test_pool_against_numpy(kind: str, dtype: str):
    got_RKD = pool(jnp.asarray(HIDDEN_RSD, dtype), STARTS_RK, LENGTHS_RK, kind)
    assert got_RKD.dtype == jnp.float32
    tolerance = 1e-6 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(got_RKD, by_hand(kind), atol=tolerance)
    assert not np.asarray(got_RKD)[LENGTHS_RK == 0].any()


@pytest.mark.parametrize("kind", POOLINGS)
def test_empty_slots_pass_no_gradient(kind: str):
    def loss(hidden_RSD):
        return normalize(pool(hidden_RSD, STARTS_RK, LENGTHS_RK, kind))[..., 0].sum()

    gradient_RSD = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(HIDDEN_RSD)))
    assert np.isfinite(gradient_RSD).all()
    # row 1 holds one text of one token at place 3, row 2 holds nothing
    assert np.abs(gradient_RSD[1, 3]).max() > 1e-2
    assert not np.delete(gradient_RSD[1], 3, axis=0).any()
    assert not gradient_RSD[2].any()


def test_normalize_gives_unit_length_and_keeps_zero():
    vectors_RKD = jnp.asarray(HIDDEN_RSD).at[0, 0].set(0.0)
    got_RKD = np.asarray(normalize(vectors_RKD), np.float64)
    lengths_RK = np.linalg.norm(got_RKD, axis=-1)
    assert lengths_RK[0, 0] == 0
    np.testing.assert_allclose(np.delete(lengths_RK.ravel(), 0), 1, atol=2e-7)
    gradient_RKD = jax.jit(jax.grad(lambda x: normalize(x).sum()))(vectors_RKD)
    assert np.isfinite(gradient_RKD).all()


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="pooling is 'max', known are cls, mean, last"):
        pool(jnp.asarray(HIDDEN_RSD), STARTS_RK, LENGTHS_RK, cast(Any, "max"))
