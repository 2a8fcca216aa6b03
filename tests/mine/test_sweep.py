"""Yields of many thresholds at once, against the rules applied one threshold at a time."""

import numpy as np
import pytest

from arcticjax.data import candidates, negatives
from arcticjax.data.negatives import Cut, Threshold
from arcticjax.mine import sweep


def lists(queries, seed=0):
    """Scores around zero, so that signs matter; some ids repeat, some are positives."""
    random = np.random.default_rng(seed)
    counts, known = random.integers(0, 12, queries), random.integers(1, 4, queries)

    def falling(sizes):
        return np.concatenate(
            [np.sort(random.normal(0, 0.4, size))[::-1] for size in sizes]
        ).astype(np.float32)

    return candidates.Candidates(
        np.arange(queries, dtype=np.uint64),
        random.integers(0, 30, counts.sum()).astype(np.uint64) + np.uint64(2**63),
        falling(counts),
        np.concatenate([[0], np.cumsum(counts)]),
        random.integers(0, 30, known.sum()).astype(np.uint64) + np.uint64(2**63),
        falling(known),
        np.concatenate([[0], np.cumsum(known)]),
    )


class Folder:
    def __init__(self, *parts):
        self.parts = parts

    def batches(self, group):
        return iter(self.parts)


def group(queries):
    return candidates.Group("a", ("a",), "text", queries, 30, "", ())


@pytest.mark.parametrize("minimum", [1, 3])
def test_equals_the_rules_applied_one_by_one(minimum):
    parts = [lists(50, seed) for seed in range(2)]
    tried = [
        *sweep.thresholds(),
        Threshold("percent", 0.9, "mean"),
        Threshold("margin", 0.05, "mean"),
    ]
    rows = sweep.sweep(Folder(*parts), group(100), minimum=minimum, tried=tried)
    assert any(0 < row.kept < 100 for row in rows)
    for row in rows:
        total = sum(
            (
                negatives.apply(
                    Cut(upper=row.threshold), sweep.for_rules(part), minimum=minimum
                ).found
                for part in parts
            ),
            negatives.Yield(),
        )
        assert (row.queries, row.kept, row.negatives) == (100, total.kept, total.eligible)


def test_rules_see_the_lists():
    flat = lists(20)
    wide = sweep.for_rules(flat)
    for query in range(20):
        part = slice(*flat.candidate_starts[query : query + 2])
        size = part.stop - part.start
        np.testing.assert_array_equal(wide.scores_QK[query, :size], flat.candidate_scores[part])
        assert (wide.ids_QK[query, size:] == -1).all()
        assert np.isnan(wide.scores_QK[query, size:]).all()
    codes = {}
    for one, code in zip(flat.candidate_ids, wide.ids_QK[wide.ids_QK >= 0], strict=True):
        assert codes.setdefault(one, code) == code
    for one, code in zip(flat.positive_ids, wide.positives_QP[wide.positives_QP >= 0], strict=True):
        assert codes.get(one, code) == code


def test_a_sample_is_spread_over_the_group():
    parts = [lists(10, seed) for seed in range(10)]
    taken = list(sweep.sampled(Folder(*parts), group(100), 30))
    assert len(taken) == 3
    numbers = [next(n for n, part in enumerate(parts) if part is one) for one in taken]
    assert max(np.diff(numbers)) <= 4
    assert len(list(sweep.sampled(Folder(*parts), group(100), 1000))) == 10
