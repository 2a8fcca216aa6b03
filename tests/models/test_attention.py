"""Segment attention against a NumPy loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcticjax.models.attention import attend

SEGMENTS_RS = np.array(
    [[1, 1, 1, 2, 2, 2, 2, 3, 0, 0], [1] * 10, [0] * 10, [0, 1, 1, 0, 2, 2, 2, 0, 0, 3]], np.int32
)


def inputs(seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    shape = (*SEGMENTS_RS.shape, 3, 8)
    return [random.normal(size=shape).astype(np.float32) for _ in range(3)]


def by_hand(query, key, value):
    query, key, value = (array.astype(np.float64) for array in (query, key, value))
    mixed = np.zeros_like(value)
    for row in range(query.shape[0]):
        for place in np.flatnonzero(SEGMENTS_RS[row]):
            own = SEGMENTS_RS[row] == SEGMENTS_RS[row, place]
            for head in range(query.shape[2]):
                scores = key[row, own, head] @ query[row, place, head] / np.sqrt(8)
                weights = np.exp(scores - scores.max())
                mixed[row, place, head] = weights @ value[row, own, head] / weights.sum()
    return mixed


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_against_numpy(dtype: str, tolerance: float):
    arrays = inputs()
    got = attend(*(jnp.asarray(array, dtype) for array in arrays), jnp.asarray(SEGMENTS_RS))
    assert got.dtype == dtype
    real = SEGMENTS_RS > 0
    np.testing.assert_allclose(
        np.asarray(got, np.float64)[real], by_hand(*arrays)[real], atol=tolerance
    )


def test_large_scores_stay_finite():
    query, key, value = inputs()
    got = attend(query * 1e3, key * 1e3, value, jnp.asarray(SEGMENTS_RS))
    real = SEGMENTS_RS > 0
    expected = by_hand(query * 1e3, key * 1e3, value)
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=1e-4)
    assert np.isfinite(got).all()


def test_no_gradient_crosses_a_segment_and_padding_is_finite():
    arrays = [jnp.asarray(array) for array in inputs()]
    chosen = jnp.asarray(SEGMENTS_RS == 2)[:, :, None, None]
    gradients = jax.jit(
        jax.grad(lambda arrays: jnp.sum(attend(*arrays, jnp.asarray(SEGMENTS_RS)) ** 2 * chosen))
    )(arrays)
    for gradient in gradients:
        gradient = np.asarray(gradient)
        assert np.isfinite(gradient).all()
        assert not gradient[SEGMENTS_RS != 2].any()
        assert np.abs(gradient[SEGMENTS_RS == 2]).max() > 1e-2
