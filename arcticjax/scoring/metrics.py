"""Retrieval metrics that equal trec_eval's, so that numbers compare with MTEB and BEIR."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from arcticjax.errors import DataError, NumericsError

NDCG_DEPTH = 10
RECIPROCAL_RANK_DEPTH = 10
RECALL_DEPTH = 100
METRICS = ("ndcg_at_10", "mrr_at_10", "recall_at_100")
RELEVANT = 1  # trec_eval's relevance level: this grade and above counts as relevant


def score(
    ranked: Mapping[str, Sequence[tuple[str, float]]],
    qrels: Mapping[str, Mapping[str, int]],
) -> dict[str, float]:
    """Means nDCG@10, reciprocal rank@10 and recall@100 over the queries that have judgements.

    ranked: for a query, (document id, score) in any order; `in_trec_order` says how ties fall.
    qrels: for a query, the grade of each judged document; unjudged documents and grades below 1
    are not relevant. A query whose judgements are all below 1 scores 0 and counts, as in trec_eval;
    a query with an empty judgement set does not count; a judged query with no ranking scores 0
    (trec_eval -c). Values are in [0, 1], float64.
    Raises DataError if nothing is judged or a document is ranked twice, NumericsError on a NaN.
    """
    values = score_queries(ranked, qrels)
    return {
        metric: math.fsum(one[metric] for one in values.values()) / len(values)
        for metric in METRICS
    }


def score_queries(
    ranked: Mapping[str, Sequence[tuple[str, float]]],
    qrels: Mapping[str, Mapping[str, int]],
) -> dict[str, dict[str, float]]:
    """Query id -> metric -> value, of which `score` gives the means."""
    judged = {query: grades for query, grades in qrels.items() if grades}
    if not judged:
        raise DataError("no query has a judgement, so there is nothing to average over")
    return {
        query: dict(zip(METRICS, _query_metrics(query, ranked.get(query, ()), grades), strict=True))
        for query, grades in judged.items()
    }


def in_trec_order(query: str, hits: Sequence[tuple[str, float]]) -> list[str]:
    """Orders documents as trec_eval does: score descending, then document id descending.

    trec_eval holds scores in single precision, so doubles that round to one float32 are tied.
    Code point order of the ids equals the byte order of their UTF-8 that trec_eval compares.
    """
    with np.errstate(over="ignore"):  # beyond float32 is infinite, there as here
        scores = np.array([value for _, value in hits], np.float64).astype(np.float32)
    if np.isnan(scores).any():
        bad = hits[int(np.isnan(scores).argmax())][0]
        raise NumericsError(
            f"query {query!r}: the score of document {bad!r} is not a number, so the ranking has "
            "no order; look for non-finite embeddings"
        )
    keyed = sorted(zip(scores.tolist(), (name for name, _ in hits), strict=True), reverse=True)
    documents = [name for _, name in keyed]
    if len(set(documents)) != len(documents):
        twice = next(name for name in documents if documents.count(name) > 1)
        raise DataError(f"query {query!r}: document {twice!r} is ranked more than once")
    return documents


def _query_metrics(
    query: str, hits: Sequence[tuple[str, float]], grades: Mapping[str, int]
) -> tuple[float, float, float]:
    found = [grades.get(document, 0) for document in in_trec_order(query, hits)]
    relevant = sum(grade >= RELEVANT for grade in grades.values())
    if not relevant:
        return 0.0, 0.0, 0.0
    best = sorted(grades.values(), reverse=True)
    ndcg = _discounted_gain(found[:NDCG_DEPTH]) / _discounted_gain(best[:NDCG_DEPTH])
    first = next(
        (rank for rank, g in enumerate(found[:RECIPROCAL_RANK_DEPTH], 1) if g >= RELEVANT), None
    )
    recall = sum(grade >= RELEVANT for grade in found[:RECALL_DEPTH]) / relevant
    return ndcg, 1.0 / first if first else 0.0, recall


def _discounted_gain(grades: Sequence[int]) -> float:
    """Sums grade / log2(rank + 1), the linear gain of trec_eval's ndcg_cut (m_ndcg_cut.c)."""
    return sum(grade / math.log2(rank + 1) for rank, grade in enumerate(grades, 1) if grade > 0)
