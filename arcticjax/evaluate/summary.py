"""From what single tasks scored to the rows of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from arcticjax.evaluate.records import Record
from arcticjax.scoring import benchmarks, published
from arcticjax.scoring.bootstrap import interval, resampled_means
from arcticjax.scoring.compression import FULL, Compression


@dataclass(frozen=True)
class Row:
    """One score: a task, or several folded into one. interval: 95 % bootstrap of nDCG@10 over
    queries; None where the task is no retrieval. compressed: nDCG@10 by compression."""

    name: str
    metrics: dict[str, float]
    interval: tuple[float, float] | None
    compressed: dict[str, float]
    documents: int
    queries: int
    seconds: float

    @property
    def ndcg(self) -> float | None:
        return self.metrics.get("ndcg_at_10")


@dataclass(frozen=True)
class Summary:
    """rows: scores in the order asked for. means: name of a benchmark, or 'mean', -> its row.
    tasks: what was scored, before tasks were folded into rows."""

    rows: list[Row]
    means: dict[str, Row]
    tasks: list[Row]


@dataclass(frozen=True)
class Comparison:
    """Published nDCG@10 beside ours. by_task: model -> score -> value, the nearest in size first.
    sizes: model -> millions of parameters, None where not published. means: model -> mean of the
    fifteen; empty unless all of them were scored."""

    by_task: dict[str, dict[str, float]]
    sizes: dict[str, int | None]
    means: dict[str, float]


def summarize(records: Sequence[Record]) -> Summary:
    """Folds tasks, draws intervals, and takes the means of complete benchmarks, or of all retrieval
    scores where there is none."""
    singles = {one.identity.task: _single(one) for one in records}
    drawn = {name: _mean(name, parts) for name, parts in benchmarks.folded(singles).items()}
    complete = benchmarks.complete(drawn)
    retrieval = [name for name, (row, _) in drawn.items() if row.ndcg is not None]
    if not complete and len(retrieval) > 1:
        complete = {"mean": tuple(retrieval)}
    return Summary(
        [row for row, _ in drawn.values()],
        {
            name: _mean(name, [drawn[score] for score in scores])[0]
            for name, scores in complete.items()
        },
        [row for row, _ in singles.values()],
    )


def compare(summary: Summary, parameters: int) -> Comparison | None:
    """What was published of the scores at hand, for a model of so many parameters; None if none of
    them is of the fifteen."""
    at_hand = {row.name for row in summary.rows} & set(benchmarks.RETRIEVAL_15)
    if not at_hand:
        return None

    def distance(model: str) -> float:
        size = published.SIZES[model]
        return math.inf if size is None else abs(math.log(size * 1e6 / parameters))

    by_task = {
        model: {score: value for score, value in values.items() if score in at_hand}
        for model, values in sorted(published.BY_TASK.items(), key=lambda one: distance(one[0]))
    }
    whole = at_hand == set(benchmarks.RETRIEVAL_15)
    return Comparison(by_task, dict(published.SIZES), dict(published.MEANS) if whole else {})


def sizes(
    compressions: Sequence[Compression], width: int, scores: Mapping[str, float]
) -> list[tuple[str, int, int, float]]:
    """(compression, dimensions, bytes per vector, nDCG@10) from the largest to the smallest."""
    rows = [
        (str(one), one.dimension or width, one.bytes_per_vector(width), scores[str(one)])
        for one in compressions
    ]
    return sorted(rows, key=lambda row: (-row[2], row[0]))


def _single(record: Record) -> tuple[Row, np.ndarray | None]:
    """A task's row and the means of its resamples; subsets count alike, as MTEB takes them."""
    means = [
        resampled_means(values[str(FULL)], f"{record.identity.task}/{part}")
        for part, values in record.values.items()
    ]
    drawn = np.mean(means, axis=0) if means else None
    compressed = {
        one: float(np.mean([np.mean(values[one]) for values in record.values.values()]))
        for one in record.identity.compressions
        if record.values
    }
    row = Row(
        record.identity.task,
        record.metrics,
        None if drawn is None else interval(drawn),
        compressed,
        record.documents,
        record.queries,
        record.seconds,
    )
    return row, drawn


def _mean(
    name: str, parts: Sequence[tuple[Row, np.ndarray | None]]
) -> tuple[Row, np.ndarray | None]:
    """The mean of scores of one kind, each counting alike."""
    if len(parts) == 1:
        return parts[0]
    rows = [row for row, _ in parts]
    drawn = np.mean([means for _, means in parts if means is not None], axis=0)

    def mean(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {key: sum(one[key] for one in values) / len(values) for key in values[0]}

    row = Row(
        name,
        mean([one.metrics for one in rows]),
        interval(drawn),
        mean([one.compressed for one in rows]),
        sum(one.documents for one in rows),
        sum(one.queries for one in rows),
        sum(one.seconds for one in rows),
    )
    return row, drawn
