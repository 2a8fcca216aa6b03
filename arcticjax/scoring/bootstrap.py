"""How far a score could be off: percentile bootstrap over the queries of a task."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
# Values drawn at once.
_BLOCK = 4_000_000


def resampled_means(values: Sequence[float], name: str, resamples: int = RESAMPLES) -> np.ndarray:
    """Means float64 [resamples] of as many values drawn with replacement, the same for the same
    `name`. Tasks are drawn independently, so the mean of several is the mean of their arrays."""
    values_Q = np.asarray(values, np.float64)
    random = np.random.default_rng(zlib.crc32(name.encode()))
    means = []
    left = resamples
    while left:
        rows = min(left, max(1, _BLOCK // len(values_Q)))
        chosen = random.integers(0, len(values_Q), (rows, len(values_Q)), dtype=np.int32)
        means.append(values_Q[chosen].mean(axis=1))
        left -= rows
    return np.concatenate(means)


def interval(means: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The middle `level` of resampled means: (low, high)."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
