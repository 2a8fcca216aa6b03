"""How a run chooses the documents of a query: the fields of `data.negatives`, stage by stage.

Axis letters: Q queries, K candidates of a query.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from arcticjax.config.negatives import NegativesConfig, ThresholdConfig
from arcticjax.data import negatives, signatures
from arcticjax.data.lists import StoredLists
from arcticjax.data.negatives import Candidates, Cut, Eligible, Sampling, Threshold


@dataclass(frozen=True)
class Policy:
    """How documents of a query are chosen; `data.negatives.*` as it is used.

    stages: (share of the run, what holds from there on), the first at 0.
    """

    positives: int
    count: int
    minimum: int
    uses: int
    sampling: Sampling
    temperature: float
    near_duplicates: float | None
    stages: tuple[tuple[float, Cut], ...]
    seed: int

    @classmethod
    def from_config(cls, config: NegativesConfig, positives: int, seed: int) -> Policy:
        """The policy of `data.negatives` and `data.positives`."""
        needed = config.count * config.uses
        return cls(
            positives=positives,
            count=config.count,
            minimum=needed if config.minimum is None else min(config.minimum, needed),
            uses=config.uses,
            sampling=config.sampling,
            temperature=config.sampling_temperature,
            near_duplicates=config.near_duplicates if config.count else None,
            stages=_stages(config) if config.count else ((0.0, Cut()),),
            seed=seed,
        )

    def starts(self) -> list[float]:
        """Where in the run each distinct cut holds first."""
        first: dict[Cut, float] = {}
        for start, cut in self.stages:
            first.setdefault(cut, start)
        return list(first.values())

    def cut_at(self, progress: float) -> Cut:
        """What holds at a share of the run."""
        # A step is where its count says, whatever rounding 0.3 * 10 suffered.
        return [cut for start, cut in self.stages if start <= progress + 1e-9][-1]

    def eligible(
        self, lists: StoredLists, queries: np.ndarray, cut: Cut
    ) -> tuple[Candidates, Eligible]:
        """The lists of some queries, and what the cut leaves of them."""
        found = lists.lists(queries)
        if self.near_duplicates is not None:
            similar_QK = signatures.similar(
                lists.signatures_DH, found.ids_QK, found.positives_QP, self.near_duplicates
            )
            found = replace(found, duplicate_QK=similar_QK)
        return found, negatives.apply(
            cut, found, minimum=self.minimum, most_positives=self.positives
        )


def _stages(config: NegativesConfig) -> tuple[tuple[float, Cut], ...]:
    """The cuts over a run: one, or those of a curriculum, a linear one in equal steps."""
    base = Cut(
        _threshold(config.thresholds.upper),
        _threshold(config.thresholds.lower),
        config.window.first,
        config.window.last,
        config.retrieved_positives,
    )
    if config.curriculum is None:
        return ((0.0, base),)
    points = [
        (
            point.start,
            _with(base, point.upper, point.lower, point.first, point.last),
        )
        for point in config.curriculum.points
    ]
    if config.curriculum.shape == "steps":
        return tuple(points)
    levels = config.curriculum.levels
    stages = []
    for (start, cut), (end, following) in itertools.pairwise(points):
        for level in range(levels):
            share = level / levels
            stages.append((start + share * (end - start), _between(cut, following, share)))
    return (*stages, points[-1])


def _between(cut: Cut, following: Cut, share: float) -> Cut:
    def value(a: Threshold | None, b: Threshold | None) -> float | None:
        return None if a is None or b is None else a.value + share * (b.value - a.value)

    last = cut.last_rank
    if last is not None and following.last_rank is not None:
        last = round(last + share * (following.last_rank - last))
    return replace(
        _with(
            cut, value(cut.upper, following.upper), value(cut.lower, following.lower), None, last
        ),
        first_rank=round(cut.first_rank + share * (following.first_rank - cut.first_rank)),
    )


def _with(
    cut: Cut, upper: float | None, lower: float | None, first: int | None, last: int | None
) -> Cut:
    def replaced(threshold: Threshold | None, value: float | None) -> Threshold | None:
        return threshold if threshold is None or value is None else replace(threshold, value=value)

    return replace(
        cut,
        upper=replaced(cut.upper, upper),
        lower=replaced(cut.lower, lower),
        first_rank=first or cut.first_rank,
        last_rank=last or cut.last_rank,
    )


def _threshold(config: ThresholdConfig | None) -> Threshold | None:
    return None if config is None else Threshold(config.kind, config.value, config.of)
