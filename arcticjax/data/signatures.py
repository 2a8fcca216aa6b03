"""Nearly equal texts, told by MinHash signatures of their tokens (Broder 1997)."""

from __future__ import annotations

import numpy as np

# H; the estimate of a similarity s has a standard error of sqrt(s (1 - s) / H), 0.06 at most.
HASHES = 64
SHINGLE = 4  # tokens
# What follows cannot tell two texts apart for an encoder that reads a few hundred tokens.
COMPARED_TOKENS = 256
# Two unlike minima share their last byte this often.
_CHANCE = 1 / 256

# Raw words of a named algorithm: the same in every release of numpy.
_GENERATOR = np.random.PCG64(1)
_MULTIPLIERS_H = _GENERATOR.random_raw(HASHES) | np.uint64(1)
_OFFSETS_H = _GENERATOR.random_raw(HASHES)
_PLACES = _GENERATOR.random_raw(SHINGLE) | np.uint64(1)


def signature(tokens: np.ndarray) -> np.ndarray:
    """uint8 [H]: a byte of the least hash of the text's runs of SHINGLE tokens, for H hashes."""
    tokens = np.asarray(tokens[:COMPARED_TOKENS]).astype(np.uint64) + np.uint64(1)
    if len(tokens) < SHINGLE:
        tokens = np.pad(tokens, (0, SHINGLE - len(tokens)))
    windows = np.lib.stride_tricks.sliding_window_view(tokens, SHINGLE)
    shingles = (windows * _PLACES).sum(axis=1, dtype=np.uint64)
    shingles ^= shingles >> np.uint64(29)
    least_H = (shingles[:, None] * _MULTIPLIERS_H + _OFFSETS_H).min(axis=0)
    return (np.right_shift(least_H, np.uint64(32)) & np.uint64(255)).astype(np.uint8)


def similar(
    signatures_DH: np.ndarray, ids_QK: np.ndarray, others_QP: np.ndarray, least: float
) -> np.ndarray:
    """[Q, K]: whether document `ids_QK` is similar to one of the row's `others_QP` by at least
    `least`, the estimated Jaccard similarity of their sets of shingles. -1 is like nothing."""
    found_QK = np.zeros(ids_QK.shape, bool)
    own_QKH = signatures_DH[np.maximum(ids_QK, 0)]
    for others_Q in others_QP.T:
        other_QH = signatures_DH[np.maximum(others_Q, 0)]
        same_QK = (own_QKH == other_QH[:, None]).mean(axis=2)
        estimate_QK = (same_QK - _CHANCE) / (1 - _CHANCE)
        found_QK |= (estimate_QK >= least - 1e-9) & (others_Q >= 0)[:, None]
    return found_QK & (ids_QK >= 0)
