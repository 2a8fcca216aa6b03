"""Exact search of a pool: one block of documents on the devices at a time, one shard of queries
after another.

Where the whole corpus fits on the devices, a shard of queries is searched and written as finished
candidates. Where it does not, what each block gives is kept on disk until all blocks are done.
Never more than a shard of queries x `top_k` is in memory.

Axis letters: Q queries of a shard, K results of a query, P positives of a shard, D embedding width.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from arcticjax.checkpoint.agreement import from_primary
from arcticjax.data import candidates
from arcticjax.data.layout import round_up
from arcticjax.mine.files import explained, write_whole
from arcticjax.mine.inputs import Pool
from arcticjax.mine.vectors import Vectors
from arcticjax.parallel import distributed
from arcticjax.parallel import mesh as meshes
from arcticjax.step.search import QUERY_BLOCK, cut_block, fitting, make_search


def block_size(wanted: int | None, total: int, dimension: int, devices: int) -> int:
    """Documents that the devices hold at once: `wanted`, or as many as fill half of their memory.

    Process 0 decides. Where a device's memory is not known, all documents are one block.
    """

    def choose() -> int:
        memory = meshes.device_memory()
        if wanted is not None or memory is None:
            return min(wanted or total, total)
        return min(total, fitting(memory, dimension, devices))

    return from_primary(choose)


@dataclass(frozen=True)
class Search:
    """What a pool's search works on. pieces: folder for the results of single blocks."""

    pool: Pool
    queries: Vectors
    documents: Vectors
    output: Path
    pieces: Path
    top_k: int
    block: int
    mesh: Mesh

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """First and last place, exclusive, of the documents of each block."""
        edges = [*range(0, len(self.documents), self.block), len(self.documents)]
        return list(itertools.pairwise(edges))

    def file(self, shard: int) -> Path:
        """The finished candidates of a shard of queries."""
        return self.output / candidates.file_name(self.pool.name, shard)

    def missing(self, block: int) -> list[int]:
        """Shards of queries that lack this block's results."""
        return [
            shard
            for shard in range(self.queries.shards)
            if not self.file(shard).exists()
            and (len(self.blocks) == 1 or not self._piece(shard, block).exists())
        ]

    def run(self) -> Iterator[int]:
        """Writes what is missing and yields the queries searched x blocks done; all processes work
        on the same shard, process 0 writes."""
        several = len(self.blocks) > 1
        if several and distributed.talks():
            with explained(self.pieces):
                self.pieces.mkdir(parents=True, exist_ok=True)
        for number, (start, stop) in enumerate(self.blocks):
            missing = from_primary(lambda number=number: self.missing(number))
            if not missing:
                continue
            find = self._ready(start, stop)
            for shard in missing:
                scores_QK, places_QK = find(self.queries.places(shard))
                if distributed.talks() and several:
                    self._write_piece(shard, number, scores_QK, places_QK)
                elif distributed.talks():
                    self._finish(shard, scores_QK, places_QK)
                yield len(scores_QK)
            del find  # lets go of the block before the next one comes
        if several and distributed.talks():
            for shard in range(self.queries.shards):
                if not self.file(shard).exists():
                    self._finish(shard, *self._merged(shard))
            shutil.rmtree(self.pieces, ignore_errors=True)

    def _ready(
        self, start: int, stop: int
    ) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """A block of documents on the devices: from places of queries to scores float32 [Q, K] and
        places of documents int64 [Q, K]."""
        devices = self.mesh.devices.size
        share, tile = cut_block(self.block, len(self.documents), devices)
        width = self.documents.shape[1]

        def part(index: Any) -> np.ndarray:
            first = start + (index[0].start or 0) * share
            last = min(first + share, stop)
            found = np.zeros((1, share, width), np.float32)
            if first < last:
                found[0, : last - first] = self.documents.read(first, last)
            return found

        documents = jax.make_array_from_callback(
            (devices, share, width), meshes.batch_sharding(self.mesh), part
        )
        total, k = np.int32(stop - start), min(self.top_k, stop - start)
        program = make_search(self.mesh, k, tile)
        rows = min(QUERY_BLOCK, round_up(len(self.queries.places(0)), 8))

        def find(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            queries_QD = self.queries.read(int(places[0]), int(places[-1]) + 1)
            scores_QK = np.empty((len(places), k), np.float32)
            places_QK = np.empty((len(places), k), np.int64)
            for first in range(0, len(places), rows):
                part_QD = queries_QD[first : first + rows]
                block_QD = np.zeros((rows, width), np.float32)
                block_QD[: len(part_QD)] = part_QD
                found = program(meshes.replicate(self.mesh, block_QD), documents, total)
                used = slice(first, first + len(part_QD))
                scores_QK[used] = np.asarray(found[0])[: len(part_QD)]
                places_QK[used] = np.asarray(found[1])[: len(part_QD)]
            return scores_QK, places_QK + start

        return find

    def _piece(self, shard: int, block: int) -> Path:
        return self.pieces / f"{self.pool.name}-{self.block}-{shard:05d}-{block:05d}.npz"

    def _write_piece(
        self, shard: int, block: int, scores_QK: np.ndarray, places_QK: np.ndarray
    ) -> None:
        write_whole(
            self._piece(shard, block),
            lambda file: np.savez(file, scores=scores_QK, places=places_QK),
        )

    def _merged(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """The best of all blocks."""
        parts = [np.load(self._piece(shard, block)) for block in range(len(self.blocks))]
        scores_QK = np.concatenate([part["scores"] for part in parts], axis=1)
        places_QK = np.concatenate([part["places"] for part in parts], axis=1)
        # Blocks follow one another in the order of places: a stable sort keeps ties in that order.
        order_QK = np.argsort(-scores_QK, axis=1, kind="stable")[:, : self.top_k]
        return (
            np.take_along_axis(scores_QK, order_QK, axis=1),
            np.take_along_axis(places_QK, order_QK, axis=1),
        )

    def _finish(self, shard: int, scores_QK: np.ndarray, places_QK: np.ndarray) -> None:
        """Parts positives from candidates and writes the shard."""
        rows = self.queries.places(shard)
        lists = part_lists(
            self.pool,
            rows,
            scores_QK,
            places_QK,
            lambda queries, documents: np.einsum(
                "pd,pd->p", self.queries.take(rows[queries]), self.documents.take(documents)
            ),
        )
        with explained(self.file(shard)):
            candidates.write_shard(self.file(shard), lists, self.pool.kind)


def part_lists(
    pool: Pool,
    rows: np.ndarray,
    scores_QK: np.ndarray,
    places_QK: np.ndarray,
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> candidates.Candidates:
    """Search results of the queries at `rows` as candidates, without positives and own texts.

    score: (index into rows [P], place of a document [P]) -> score [P], for positives that were not
    found; those that were keep the score they were found with.
    """
    total = len(pool.documents)
    counts_Q = np.diff(pool.positive_starts)[rows]
    first, last = pool.positive_starts[rows[0]], pool.positive_starts[rows[-1] + 1]
    positives = pool.positives[first:last]
    queries = np.repeat(np.arange(len(rows)), counts_Q)

    # Pairs of query and document as one number each; those of positives ascend.
    pairs = queries * total + positives
    found_QK = np.arange(len(rows))[:, None] * total + places_QK
    where_QK = np.searchsorted(pairs, found_QK)
    positive_QK = np.append(pairs, -1)[where_QK] == found_QK
    scores = np.full(len(pairs), np.nan, np.float32)
    scores[where_QK[positive_QK]] = scores_QK[positive_QK]
    unknown = np.flatnonzero(np.isnan(scores))
    if unknown.size:
        scores[unknown] = score(queries[unknown], positives[unknown])
    order = np.lexsort((positives, -scores, queries))

    rest_QK = ~positive_QK & (places_QK != pool.own_Q[rows][:, None])
    return candidates.Candidates(
        query_ids=pool.queries.ids[rows],
        candidate_ids=pool.documents.ids[places_QK[rest_QK]],
        candidate_scores=scores_QK[rest_QK],
        candidate_starts=np.concatenate([[0], np.cumsum(rest_QK.sum(axis=1))]),
        positive_ids=pool.documents.ids[positives[order]],
        positive_scores=scores[order],
        positive_starts=np.concatenate([[0], np.cumsum(counts_Q)]),
    )
