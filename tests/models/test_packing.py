"""Segments and positions of packed rows, against a loop written out."""

import jax.numpy as jnp
import numpy as np

from arcticjax.models.packing import segments_and_positions


def by_hand(starts_RK: np.ndarray, lengths_RK: np.ndarray, row_length: int):
    segments_RS = np.zeros((len(starts_RK), row_length), np.int32)
    positions_RS = np.zeros_like(segments_RS)
    for row, (starts, lengths) in enumerate(zip(starts_RK, lengths_RK, strict=True)):
        for slot, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            segments_RS[row, start : start + length] = slot + 1
            positions_RS[row, start : start + length] = range(length)
    return segments_RS, positions_RS


def test_rows_full_ragged_with_gaps_and_empty():
    starts_RK = np.array([[0, 5, 16], [0, 16, 16], [2, 9, 16], [16, 16, 16]], np.int32)
    lengths_RK = np.array([[5, 11, 0], [16, 0, 0], [3, 4, 0], [0, 0, 0]], np.int32)
    segments_RS, positions_RS = segments_and_positions(
        jnp.asarray(starts_RK), jnp.asarray(lengths_RK), 16
    )
    expected_segments_RS, expected_positions_RS = by_hand(starts_RK, lengths_RK, 16)
    np.testing.assert_array_equal(segments_RS, expected_segments_RS)
    np.testing.assert_array_equal(positions_RS, expected_positions_RS)
    assert segments_RS.dtype == positions_RS.dtype == jnp.int32


def test_random_rows():
    random = np.random.default_rng(0)
    starts_RK = np.full((20, 8), 64, np.int32)
    lengths_RK = np.zeros((20, 8), np.int32)
    for row in range(20):
        edges = np.sort(random.choice(65, random.integers(2, 10), replace=False))
        starts_RK[row, : len(edges) - 1] = edges[:-1]
        lengths_RK[row, : len(edges) - 1] = np.diff(edges)
    got = segments_and_positions(jnp.asarray(starts_RK), jnp.asarray(lengths_RK), 64)
    for ours, expected in zip(got, by_hand(starts_RK, lengths_RK, 64), strict=True):
        np.testing.assert_array_equal(ours, expected)
