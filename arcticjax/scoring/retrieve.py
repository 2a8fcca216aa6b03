"""Scores an embedding function on a retrieval task by exhaustive search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from arcticjax.errors import DataError, NumericsError
from arcticjax.scoring.beir import Task
from arcticjax.scoring.metrics import RECALL_DEPTH, score

Embed = Callable[[list[str], Literal["query", "document"]], np.ndarray]
Search = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Evaluation:
    """What one model scored on one task.

    metrics: as `metrics.score` returns them.
    ranked: for each judged query its best documents as (document id, score), best first.
    """

    task: str
    metrics: dict[str, float]
    ranked: dict[str, list[tuple[str, float]]]


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
