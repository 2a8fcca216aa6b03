"""Finds texts that nearly equal an earlier one, by MinHash (Broder 1997) with banding."""

from __future__ import annotations

import re
import zlib

import numpy as np

# Only the beginning of a long text is compared: no encoder here reads further than a few hundred
# words, so what follows cannot tell two texts apart for it.
COMPARED_WORDS = 200
SHINGLE = 4  # words
BANDS, BAND_SIZE = 16, 4  # a pair of Jaccard similarity 0.7 shares a band with probability 0.99
SIMILARITY = 0.7

_WORD = re.compile(r"\w+")
# Raw words of a named algorithm: the same in every release of numpy.
_GENERATOR = np.random.PCG64(0)
_MULTIPLIERS = _GENERATOR.random_raw(BANDS * BAND_SIZE) | np.uint64(1)
_OFFSETS = _GENERATOR.random_raw(BANDS * BAND_SIZE)
_SHINGLE_MULTIPLIERS = _GENERATOR.random_raw(SHINGLE) | np.uint64(1)


def words_of(text: str) -> list[str]:
    """The words of `text`, caseless and without punctuation."""
    return _WORD.findall(text.casefold())


class NearDuplicates:
    """Remembers texts; the answer for a text depends on those added before it and on their order.

    Two texts are near-duplicates when the estimated Jaccard similarity of their sets of SHINGLE
    consecutive words, over their first COMPARED_WORDS words, is at least SIMILARITY (standard
    error 0.06).
    """

    def __init__(self) -> None:
        self._word_hashes: dict[str, int] = {}
        self._signatures: list[np.ndarray] = []
        self._bands: dict[tuple[int, bytes], list[int]] = {}

    def add(self, text: str) -> bool:
        """Remembers `text`; if an earlier text nearly equals it, returns False and does not."""
        signature = self._signature(words_of(text)[:COMPARED_WORDS])
        bands = [
            (band, signature[band * BAND_SIZE : (band + 1) * BAND_SIZE].tobytes())
            for band in range(BANDS)
        ]
        candidates = {index for band in bands for index in self._bands.get(band, ())}
        for index in candidates:
            if np.mean(self._signatures[index] == signature) >= SIMILARITY:
                return False
        for band in bands:
            self._bands.setdefault(band, []).append(len(self._signatures))
        self._signatures.append(signature)
        return True

    def _signature(self, words: list[str]) -> np.ndarray:
        known = self._word_hashes
        for word in words:
            if word not in known:
                known[word] = zlib.crc32(word.encode())
        hashes = np.array([known[word] for word in words], dtype=np.uint64)
        if len(hashes) < SHINGLE:
            hashes = np.pad(hashes, (0, SHINGLE - len(hashes)))
        count = len(hashes) - SHINGLE + 1
        shingles = np.zeros(count, dtype=np.uint64)
        for offset, multiplier in enumerate(_SHINGLE_MULTIPLIERS):
            shingles += hashes[offset : offset + count] * multiplier
        shingles ^= shingles >> np.uint64(29)
        minima = (shingles * _MULTIPLIERS[:, None] + _OFFSETS[:, None]).min(axis=1)
        return (minima >> np.uint64(32)).astype(np.uint32)
