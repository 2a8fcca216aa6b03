"""What there is to know of a group's candidates, from the files and, for a sample, the texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arcticjax.data import candidates
from arcticjax.mine.false_negatives import Estimate, signs
from arcticjax.mine.inputs import Pool
from arcticjax.mine.sweep import MOST_QUERIES, Row, sampled, sweep

BINS = np.round(np.linspace(-1, 1, 101), 2)
# Candidates of an example that are shown.
SHOWN = 5


@dataclass(frozen=True)
class Example:
    """A query with its positives and best candidates, each as (score, text, signs)."""

    query: str
    positives: list[tuple[float, str]]
    candidates: list[tuple[float, str, list[str]]]


@dataclass(frozen=True)
class Statistics:
    """histograms: counts in BINS of the scores of positives, of all candidates, and of the best,
    10th and 100th candidate of each query. ahead: queries whose best positive is outscored by so
    many candidates. sampled: queries that these are of. rows: the yields of a query that is kept
    with `minimum` negatives."""

    group: candidates.Group
    histograms: dict[str, np.ndarray]
    ahead: dict[str, int]
    sampled: int
    minimum: int
    rows: list[Row]
    estimate: Estimate
    examples: list[Example]


RANK_EDGES = (0, 1, 5, 10, 100, 1000)


def collect(
    folder: candidates.CandidateFolder,
    pool: Pool,
    *,
    minimum: int,
    queries: int,
    depth: int,
    examples: int,
    seed: int = 0,
) -> Statistics:
    """Reads a group's files once for scores and yields, and texts of `queries` of its queries to a
    depth of `depth` candidates."""
    group = next(one for one in folder.groups if one.name == pool.name)
    histograms: dict[str, np.ndarray] = {}
    ahead = {_ahead_name(number): 0 for number in range(len(RANK_EDGES) + 1)}
    estimate, shown, seen = Estimate(), [], 0
    random = np.random.Generator(np.random.PCG64(seed))
    most = max(queries, MOST_QUERIES)
    share = queries / max(1, min(group.queries, most))
    for batch in sampled(folder, group, most):
        _count(histograms, batch)
        _count_ahead(ahead, batch)
        seen += len(batch)
        for query in np.flatnonzero(random.random(len(batch)) < share).tolist():
            example, found = _compare(pool, batch, query, depth)
            estimate.add(found)
            if len(shown) < examples:
                shown.append(example)
    return Statistics(
        group=group,
        histograms=histograms,
        ahead=ahead,
        sampled=seen,
        minimum=minimum,
        rows=sweep(folder, group, minimum=minimum),
        estimate=estimate,
        examples=shown,
    )


def _count(histograms: dict[str, np.ndarray], batch: candidates.Candidates) -> None:
    starts, sizes = batch.candidate_starts[:-1], np.diff(batch.candidate_starts)
    parts = {"positives": batch.positive_scores, "all candidates": batch.candidate_scores}
    for rank, name in ((1, "best candidate"), (10, "10th candidate"), (100, "100th candidate")):
        parts[name] = batch.candidate_scores[starts[sizes >= rank] + rank - 1]
    for name, scores in parts.items():
        counts = np.histogram(np.clip(scores, -1, 1), BINS)[0]
        histograms[name] = histograms.get(name, 0) + counts


def _count_ahead(ahead: dict[str, int], batch: candidates.Candidates) -> None:
    best_Q = batch.positive_scores[batch.positive_starts[:-1]]
    above = batch.candidate_scores > np.repeat(best_Q, np.diff(batch.candidate_starts))
    counts_Q = np.diff(np.concatenate([[0], np.cumsum(above)])[batch.candidate_starts])
    for number, count in enumerate(np.bincount(np.searchsorted(RANK_EDGES, counts_Q)).tolist()):
        ahead[_ahead_name(number)] += count


def _ahead_name(number: int) -> str:
    if number == 0:
        return "none"
    if number == len(RANK_EDGES):
        return f"more than {RANK_EDGES[-1]:,}"
    low, high = RANK_EDGES[number - 1] + 1, RANK_EDGES[number]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _compare(
    pool: Pool, batch: candidates.Candidates, query: int, depth: int
) -> tuple[Example, list[list[str]]]:
    start, end = batch.candidate_starts[query : query + 2]
    end = min(end, start + depth)
    scores = batch.candidate_scores[start:end].tolist()
    first, last = batch.positive_starts[query : query + 2]
    text = pool.queries.texts(_places(pool.queries.ids, batch.query_ids[query : query + 1]))[0]
    positives = pool.documents.texts(_places(pool.documents.ids, batch.positive_ids[first:last]))
    others = pool.documents.texts(_places(pool.documents.ids, batch.candidate_ids[start:end]))
    positive_scores = batch.positive_scores[first:last].tolist()
    found = signs(text, positives, positive_scores[0], others, scores)
    example = Example(
        text,
        list(zip(positive_scores, positives, strict=True))[:SHOWN],
        list(zip(scores, others, found, strict=True))[:SHOWN],
    )
    return example, found


def _places(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return np.searchsorted(ids, wanted)


def share_text(counts: Sequence[int]) -> list[str]:
    """Counts as percentages of their sum."""
    total = max(1, sum(counts))
    return [f"{100 * count / total:.1f} %" for count in counts]
