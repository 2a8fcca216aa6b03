"""Exhaustive search of a retrieval task, and what an embedding function scores by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jax.sharding import Mesh

from arcticjax.errors import DataError, NumericsError
from arcticjax.scoring.beir import Task
from arcticjax.scoring.compression import Compression
from arcticjax.scoring.metrics import RECALL_DEPTH, score

Embed = Callable[[list[str], Literal["query", "document"]], np.ndarray]
Search = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
# Query id -> (document id, score), best first.
Ranking = dict[str, list[tuple[str, float]]]


@dataclass(frozen=True)
class Evaluation:
    """What one model scored on one task.

    metrics: as `metrics.score` returns them.
    ranked: for each judged query its best documents as (document id, score), best first.
    """

    task: str
    metrics: dict[str, float]
    ranked: Ranking


def evaluate(task: Task, embed: Embed, search: Search) -> Evaluation:
    """Embeds a task's judged queries and all its documents, searches, and scores the ranking.

    embed: (texts, "query" | "document") -> float [texts, D]; it applies the prompts.
    search: (queries_QD, documents_TD, k) -> (scores_Qk, indices_Qk), indices into the documents.
    A document is never dropped for having the id of the query: the two id spaces are separate.
    Raises NumericsError on non-finite embeddings, DataError if no query is judged.
    """
    judged = [i for i, query_id in enumerate(task.query_ids) if task.qrels.get(query_id)]
    query_ids = [task.query_ids[i] for i in judged]
    if not judged:
        raise DataError(
            f"task {task.name!r}: no query has a judgement, so there is nothing to score"
        )
    queries_QD = _embedded(task, embed, query_ids, [task.queries[i] for i in judged], "query")
    documents_TD = _embedded(task, embed, task.document_ids, task.documents, "document")
    k = min(RECALL_DEPTH, len(task.documents))
    found = search(queries_QD, documents_TD, k)
    scores_Qk, indices_Qk = np.asarray(found[0]), np.asarray(found[1])
    if scores_Qk.shape != (len(judged), k) or indices_Qk.shape != (len(judged), k):
        raise ValueError(
            f"search returned shapes {scores_Qk.shape} and {indices_Qk.shape}, "
            f"expected {(len(judged), k)} twice"
        )
    if not (0 <= indices_Qk.min() and indices_Qk.max() < len(task.documents)):
        raise ValueError(f"search returned an index outside the {len(task.documents)} documents")
    ranked = {
        query_id: [(task.document_ids[i], s) for i, s in zip(indices, scores, strict=True)]
        for query_id, indices, scores in zip(
            query_ids, indices_Qk.tolist(), scores_Qk.tolist(), strict=True
        )
    }
    return Evaluation(task.name, score(ranked, task.qrels), ranked)


def evaluate_each(
    task: Task, embed: Embed, compressions: Sequence[Compression], mesh: Mesh
) -> dict[Compression, Evaluation]:
    """As `evaluate`, with vectors kept in each of several ways; texts are embedded once."""
    vectors: dict[str, np.ndarray] = {}

    def once(texts: list[str], side: Literal["query", "document"]) -> np.ndarray:
        if side not in vectors:
            vectors[side] = embed(texts, side)
        return vectors[side]

    def search_as(compression: Compression) -> Search:
        return lambda queries, documents, k: compression.search(
            compression.keep(queries), compression.keep(documents), k, mesh
        )

    return {one: evaluate(task, once, search_as(one)) for one in compressions}


def rank(
    queries_QD: np.ndarray,
    documents: Iterable[np.ndarray],
    compressions: Sequence[Compression],
    k: int,
    mesh: Mesh,
) -> dict[Compression, tuple[np.ndarray, np.ndarray]]:
    """The k best documents of each query with vectors kept in each of several ways.

    documents: their unit vectors float32 [texts, D], chunk by chunk, so that a corpus need not fit
    in memory. Returns scores float32 [Q, min(k, documents)], descending, and the documents' places
    in the corpus. Documents of equal score come in their order.
    """
    kept = {one: one.keep(queries_QD) for one in compressions}
    best: dict[Compression, tuple[np.ndarray, np.ndarray]] = {}
    before = 0
    for vectors_TD in documents:
        for one in compressions:
            scores_Qk, places_Qk = one.search(kept[one], one.keep(vectors_TD), k, mesh)
            places_Qk = places_Qk.astype(np.int64) + before
            if one in best:
                scores_Qk = np.concatenate([best[one][0], scores_Qk], axis=1)
                places_Qk = np.concatenate([best[one][1], places_Qk], axis=1)
                order_Qk = np.argsort(-scores_Qk, axis=1, kind="stable")[:, :k]
                scores_Qk = np.take_along_axis(scores_Qk, order_Qk, axis=1)
                places_Qk = np.take_along_axis(places_Qk, order_Qk, axis=1)
            best[one] = scores_Qk, places_Qk
        before += len(vectors_TD)
    return best


def _embedded(
    task: Task, embed: Embed, ids: list[str], texts: list[str], prompt: Literal["query", "document"]
) -> np.ndarray:
    vectors = np.asarray(embed(texts, prompt))
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(f"embed returned shape {vectors.shape} for {len(texts)} texts")
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        raise NumericsError(
            f"task {task.name!r}: {bad.size} of {len(texts)} {prompt} embeddings are not finite, "
            f"the first is {ids[bad[0]]!r}; the model's weights or activations have overflowed"
        )
    return vectors
