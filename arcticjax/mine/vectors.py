"""Embeddings in shards on disk, each whole or absent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np

from arcticjax.checkpoint.agreement import from_primary
from arcticjax.errors import DataError, NumericsError
from arcticjax.mine.files import write_whole
from arcticjax.mine.inputs import Texts
from arcticjax.parallel import distributed
from arcticjax.step.embedder import Embedder, Side


class Vectors:
    """Float32 vectors [total, D] in files of `shard` rows, `NAME-00000.npy` and so on."""

    def __init__(self, folder: Path, name: str, total: int, shard: int, dimension: int) -> None:
        self.shape = (total, dimension)
        self.shards = math.ceil(total / shard)
        self._folder, self._name, self._shard = folder, name, shard

    def __len__(self) -> int:
        return self.shape[0]

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self._folder / f"{self._name}-{shard:05d}.npy"

    def places(self, shard: int) -> np.ndarray:
        """Rows of a shard."""
        return np.arange(shard * self._shard, min(len(self), (shard + 1) * self._shard))

    def missing(self) -> list[int]:
        """Shards that are not there yet."""
        return [shard for shard in range(self.shards) if not self.path(shard).exists()]

    def write(self, shard: int, vectors_TD: np.ndarray) -> None:
        """Writes a shard that appears whole or not at all."""
        write_whole(self.path(shard), lambda file: np.save(file, vectors_TD))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, float32 [stop - start, D]."""
        result = np.empty((stop - start, self.shape[1]), np.float32)
        for shard in range(start // self._shard, math.ceil(stop / self._shard)):
            first = shard * self._shard
            low, high = max(start, first), min(stop, first + self._shard)
            result[low - start : high - start] = self._open(shard)[low - first : high - first]
        return result

    def take(self, places: np.ndarray) -> np.ndarray:
        """Rows at `places`, float32 [places, D]."""
        result = np.empty((len(places), self.shape[1]), np.float32)
        shards = places // self._shard
        for shard in np.unique(shards).tolist():
            chosen = np.flatnonzero(shards == shard)
            result[chosen] = self._open(shard)[places[chosen] - shard * self._shard]
        return result

    def _open(self, shard: int) -> np.ndarray:
        path = self.path(shard)
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{path}: cannot be read ({error}); delete it, and the same command makes it again"
            ) from error
        expected = (len(self.places(shard)), self.shape[1])
        if found.shape != expected or found.dtype != np.float32:
            raise DataError(
                f"{path}: holds {found.dtype}{list(found.shape)}, expected float32"
                f"{list(expected)}; delete it, and the same command makes it again"
            )
        return cast(np.ndarray, found)


def embed(embedder: Embedder, texts: Texts, side: Side, vectors: Vectors) -> Iterator[int]:
    """Writes the shards that are missing and yields the number of texts of each; all processes
    work on the same shard.

    Raises NumericsError naming a text whose vector is not finite.
    """
    for shard in from_primary(vectors.missing):
        places = vectors.places(shard)
        found_TD = embedder.encode_tokens(texts.tokens(places), side)
        bad = np.flatnonzero(~np.isfinite(found_TD).all(axis=1))
        if bad.size:
            raise NumericsError(
                f"the teacher's vectors of {bad.size} of {len(places)} texts are not finite, the "
                f"first is {side} {texts.ids[places[bad[0]]]}; set precision: float32, or look at "
                "the teacher's weights"
            )
        if distributed.talks():
            vectors.write(shard, found_TD)
        yield len(places)
