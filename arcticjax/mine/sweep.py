"""What thresholds leave of stored candidates, for many thresholds at once.

The rules are those by which training cuts (`data.negatives`): one pass leaves out positives and
repeated texts, and counts what each upper threshold lets through.

Axis letters: Q queries, K candidates of a query, P positives of a query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from arcticjax.data import candidates, negatives
from arcticjax.data.negatives import Cut, Threshold

# Upper thresholds that are tried, by kind.
GRIDS = {
    "absolute": (*np.round(np.arange(0.1, 0.96, 0.05), 2).tolist(), 1.0),
    "percent": (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 1.0),
    "margin": (0.3, 0.2, 0.15, 0.1, 0.075, 0.05, 0.025, 0.0),
}
# Queries looked at: more would change no digit that is shown.
MOST_QUERIES = 20_000


@dataclass(frozen=True)
class Row:
    """What one upper threshold leaves. kept: queries with at least `minimum` negatives.
    negatives: eligible candidates, over all queries with a positive."""

    threshold: Threshold
    queries: int
    kept: int
    negatives: int

    @property
    def kept_share(self) -> float:
        """Kept queries as a share of all."""
        return self.kept / max(1, self.queries)

    @property
    def mean_negatives(self) -> float:
        """Eligible candidates of a query."""
        return self.negatives / max(1, self.queries)


def thresholds() -> list[Threshold]:
    """Every upper threshold of a sweep."""
    return [Threshold(kind, value) for kind, grid in GRIDS.items() for value in grid]  # pyright: ignore[reportArgumentType]


def sweep(
    folder: candidates.CandidateFolder,
    group: candidates.Group,
    *,
    minimum: int,
    most_queries: int = MOST_QUERIES,
    tried: Sequence[Threshold] | None = None,
) -> list[Row]:
    """The yield of each upper threshold (default: `thresholds()`) over a group's queries, or over
    an even sample of about `most_queries` where it has more."""
    tried = thresholds() if tried is None else tried
    queries, kept, eligible = 0, [0] * len(tried), [0] * len(tried)
    for batch in sampled(folder, group, most_queries):
        given = for_rules(batch)
        free = negatives.apply(Cut(), given, minimum=0)
        used_QP = free.positives_QP
        scores_QP = np.take_along_axis(given.positive_scores_QP, np.maximum(used_QP, 0), axis=1)
        scores_QP = np.where(used_QP >= 0, scores_QP, np.nan)
        queries += len(batch)
        for number, threshold in enumerate(tried):
            limits_Q = threshold.limits(scores_QP).astype(np.float32)
            counts_Q = (free.mask_QK & (given.scores_QK <= limits_Q[:, None])).sum(axis=1)
            kept[number] += int((free.kept_Q & (counts_Q >= minimum)).sum())
            eligible[number] += int(counts_Q.sum())
    return [
        Row(threshold, queries, kept[number], eligible[number])
        for number, threshold in enumerate(tried)
    ]


def sampled(
    folder: candidates.CandidateFolder, group: candidates.Group, most_queries: int
) -> Iterator[candidates.Candidates]:
    """All batches of a group, or evenly spaced ones with about `most_queries` queries in all.

    Queries are in the order of their ids, which are hashes for texts, so any batch is a random
    sample of them.
    """
    share = min(1.0, most_queries / max(1, group.queries))
    seen, taken = 0, 0
    for batch in folder.batches(group):
        seen += len(batch)
        if taken < share * seen:
            taken += len(batch)
            yield batch


def for_rules(batch: candidates.Candidates) -> negatives.Candidates:
    """Flat lists as the padded arrays that the rules take."""
    ids = pa.array(np.concatenate([batch.candidate_ids, batch.positive_ids]))
    codes = ids.dictionary_encode().indices.to_numpy().astype(np.int64)
    cut = len(batch.candidate_ids)
    return negatives.Candidates(
        ids_QK=padded(codes[:cut], batch.candidate_starts, -1),
        scores_QK=padded(batch.candidate_scores, batch.candidate_starts, np.nan),
        positives_QP=padded(codes[cut:], batch.positive_starts, -1),
        positive_scores_QP=padded(batch.positive_scores, batch.positive_starts, np.nan),
    )


def padded(values: np.ndarray, starts: np.ndarray, fill: float) -> np.ndarray:
    """Lists laid end to end as the rows of one array, at least one wide, filled up with `fill`."""
    counts = np.diff(starts)
    rows = np.full((len(counts), max(1, int(counts.max(initial=0)))), fill, values.dtype)
    rows[np.arange(rows.shape[1]) < counts[:, None]] = values
    return rows


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Header and rows of a table: rule, threshold, queries kept, negatives of a query."""
    return [
        ["upper threshold", "value", "queries kept", "share", "negatives a query"],
        *(
            [
                named(row.threshold),
                f"{row.threshold.value:g}",
                f"{row.kept:,}",
                f"{100 * row.kept_share:.1f} %",
                f"{row.mean_negatives:.1f}",
            ]
            for row in rows
        ),
    ]


def named(threshold: Threshold) -> str:
    """What a threshold's value is measured from."""
    return {
        "absolute": "score",
        "percent": f"share of the {threshold.of} positive's score",
        "margin": f"below the {threshold.of} positive by",
    }[threshold.kind]
