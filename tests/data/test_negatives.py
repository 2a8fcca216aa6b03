"""Cutting candidates: against a reference in plain Python, and rule by rule."""

import dataclasses
import math

import numpy as np
import pytest

from arcticjax.data import negatives
from arcticjax.data.draw import permutation_keys
from arcticjax.data.negatives import Candidates, Cut, Threshold, Yield

KEYS = permutation_keys("negatives", 0)


def one(ids, scores, positives, positive_scores):
    return Candidates.from_lists([ids], [scores], [positives], [positive_scores])


def eligible(cut, candidates, minimum=1, most_positives=1):
    found = negatives.apply(cut, candidates, minimum=minimum, most_positives=most_positives)
    return np.flatnonzero(found.mask_QK[0]).tolist(), found


def reference_cut(cut, ids, scores, positives, positive_scores, most):
    """Places of eligible candidates of one query, in plain Python; None without a positive."""
    usable = list(zip(positive_scores, positives, strict=True))
    if cut.retrieved:
        usable = [pair for pair in usable if pair[0] >= min(scores)]
    usable = sorted(usable, key=lambda pair: -pair[0])[:most]
    if not usable:
        return None
    kept = [score for score, _ in usable]

    def limit(threshold):
        if threshold.kind == "absolute":
            return threshold.value
        base = min(kept) if threshold.of == "lowest" else sum(kept) / len(kept)
        if threshold.kind == "margin":
            return base - threshold.value
        return base * threshold.value if base >= 0 else base * (2 - threshold.value)

    places, rank, seen = [], 0, set()
    for place, (document, score) in enumerate(zip(ids, scores, strict=True)):
        if document in positives or document in seen:
            continue
        seen.add(document)
        rank += 1
        if rank < cut.first_rank or (cut.last_rank is not None and rank > cut.last_rank):
            continue
        if cut.upper is not None and score > limit(cut.upper) + 1e-6:
            continue
        if cut.lower is not None and score < limit(cut.lower) - 1e-6:
            continue
        places.append(place)
    return places


@pytest.mark.parametrize("shift", [0.0, -1.5], ids=["scores around 0.5", "negative scores"])
@pytest.mark.parametrize(
    "cut",
    [
        Cut(),
        Cut(upper=Threshold("absolute", 0.4)),
        Cut(upper=Threshold("percent", 0.9, "lowest"), first_rank=3, last_rank=20),
        Cut(upper=Threshold("margin", 0.1, "mean"), lower=Threshold("margin", 0.5, "lowest")),
        Cut(upper=Threshold("percent", 0.95, "mean"), retrieved=True),
    ],
    ids=["none", "absolute", "percent and window", "margins", "percent of mean, retrieved"],
)
def test_a_cut_equals_the_reference(cut, shift):
    random = np.random.default_rng(5)
    rows = []
    for _ in range(50):
        depth, slots = random.integers(0, 40), random.integers(1, 4)
        ids = random.integers(0, 60, depth).tolist()
        scores = np.sort(random.uniform(0, 1, depth).astype(np.float32) + np.float32(shift))[::-1]
        positives = random.choice(60, slots, replace=False).tolist()
        positive_scores = random.uniform(0.2, 1, slots).astype(np.float32) + np.float32(shift)
        rows.append((ids, scores.tolist(), positives, positive_scores.tolist()))
    candidates = Candidates.from_lists(*zip(*rows, strict=True))
    found = negatives.apply(cut, candidates, minimum=2, most_positives=2)
    kept = 0
    for index, row in enumerate(rows):
        if cut.retrieved and not row[1]:
            continue  # nothing was searched
        expected = reference_cut(cut, *row, most=2)
        assert np.flatnonzero(found.mask_QK[index]).tolist() == (expected or [])
        assert found.kept_Q[index] == (expected is not None and len(expected) >= 2)
        kept += bool(found.kept_Q[index])
    counts = found.found
    assert 0 < kept == counts.kept
    assert counts.queries == 50 == counts.no_positive + counts.too_few + counts.kept
    assert counts.eligible == found.mask_QK.sum()
    assert counts.candidates == (
        counts.positives + counts.duplicates + counts.siblings + counts.out_of_window
        + counts.above + counts.below + counts.eligible
    )  # fmt: skip


@pytest.mark.parametrize("positive", [0.8, -0.8, 0.0])
@pytest.mark.parametrize("kind,value", [("percent", 0.95), ("margin", 0.05), ("percent", 1.0)])
def test_a_relative_limit_is_never_above_the_positive(positive, kind, value):
    (limit,) = Threshold(kind, value).limits(np.array([[positive]]))
    assert limit <= positive
    if value != 1.0 and (kind == "margin" or positive):
        assert limit < positive


def test_relative_limits_are_of_the_lowest_or_mean_positive():
    scores = np.array([[0.8, 0.6, np.nan]])
    assert Threshold("margin", 0.1, "lowest").limits(scores) == pytest.approx([0.5])
    assert Threshold("margin", 0.1, "mean").limits(scores) == pytest.approx([0.6])
    assert Threshold("percent", 0.95, "lowest").limits(scores) == pytest.approx([0.57])
    assert math.isnan(Threshold("margin", 0.1).limits(np.array([[np.nan]]))[0])


def test_any_known_positive_is_no_negative_also_one_not_in_use():
    places, found = eligible(Cut(), one("abc", [0.9, 0.8, 0.7], "ab", [0.95, 0.9]))
    assert places == [2]
    assert found.positives_QP.tolist() == [[0]]
    assert found.found.positives == 2


def test_duplicates_do_not_count_and_take_no_rank():
    rows = one("aabc", [0.9, 0.9, 0.8, 0.7], "x", [0.95])
    places, found = eligible(Cut(last_rank=2), rows)
    assert places == [0, 2]
    marked = Candidates(
        rows.ids_QK, rows.scores_QK, rows.positives_QP, rows.positive_scores_QP,
        np.array([[True, False, False, False]]),
    )  # fmt: skip
    places, found = eligible(Cut(last_rank=1), marked)
    assert places == [2] and found.found.duplicates == 2


def test_pieces_of_a_positives_document_do_not_count_and_take_no_rank():
    rows = one("abcd", [0.9, 0.8, 0.7, 0.6], "xa", [0.95, 0.9])
    siblings = np.array([[True, True, False, False]])
    rows = dataclasses.replace(rows, sibling_QK=siblings)
    places, found = eligible(Cut(last_rank=1), rows)
    assert places == [2]
    assert (found.found.positives, found.found.siblings, found.found.out_of_window) == (1, 1, 1)


def test_unknown_scores_pass_no_threshold_but_a_window():
    rows = one("abc", [math.nan] * 3, "x", [math.nan])
    assert eligible(Cut(first_rank=2), rows)[0] == [1, 2]
    assert eligible(Cut(upper=Threshold("absolute", 0.9)), rows)[0] == []
    places, found = eligible(Cut(upper=Threshold("margin", 0.1)), rows)
    assert places == [] and found.found.no_positive == 1


def test_the_best_positives_are_in_use_and_set_the_limit():
    rows = one("abc", [0.7, 0.55, 0.3], "xyz", [0.5, 0.9, 0.6])
    places, found = eligible(Cut(upper=Threshold("margin", 0.0)), rows, most_positives=2)
    assert found.positives_QP.tolist() == [[1, 2]]
    assert places == [1, 2]


def test_yields_add_up():
    cut = Cut(upper=Threshold("absolute", 0.5))
    parts = [one("ab", [0.9, 0.4], "x", [1.0]), one("ab", [0.9, 0.8], "x", [1.0])]
    found = [eligible(cut, part)[1].found for part in parts]
    total = sum(found, Yield())
    assert (total.queries, total.kept, total.too_few) == (2, 1, 1)
    assert (total.candidates, total.above, total.eligible) == (4, 3, 1)
    assert "1 of 2 queries kept" in str(total)


def chosen(sampling, count=3, use=0, keys=KEYS, queries=(0, 1, 2, 3), depth=10, mask=None):
    queries = np.asarray(queries)
    ids = np.broadcast_to(np.arange(depth), (len(queries), depth)) + 100
    scores = np.broadcast_to(np.linspace(0.9, 0.1, depth, dtype=np.float32), ids.shape)
    rows = Candidates(ids, scores, np.full((len(queries), 1), -1), np.zeros((len(queries), 1)))
    mask = np.ones(ids.shape, bool) if mask is None else mask
    return negatives.choose(
        mask, rows, queries, count, sampling=sampling, keys=keys, use_Q=use, temperature=0.2
    )


@pytest.mark.parametrize("sampling", ["top", "random", "weighted"])
def test_uses_share_no_negative_and_all_together_take_everything(sampling):
    uses = [chosen(sampling, use=use) for use in range(4)]
    for query in range(4):
        taken = np.concatenate([use[query] for use in uses])
        assert sorted(taken[taken >= 0].tolist()) == list(range(10))
        assert uses[3][query].tolist()[1:] == [-1, -1]


def test_top_takes_the_best_scored_eligible():
    mask = np.ones((4, 10), bool)
    mask[:, [0, 2]] = False
    assert chosen("top", mask=mask).tolist() == [[1, 3, 4]] * 4


@pytest.mark.parametrize("sampling", ["random", "weighted"])
def test_what_is_sampled_depends_on_query_and_key_alone(sampling):
    together = chosen(sampling)
    assert np.array_equal(chosen(sampling, queries=(2,))[0], together[2])
    assert not np.array_equal(together[0], together[1])
    other = chosen(sampling, keys=permutation_keys("negatives", 1))
    assert not np.array_equal(together, other)


def test_sampling_follows_its_weights():
    queries = np.arange(20000)
    first = chosen("random", count=1, queries=tuple(queries))[:, 0]
    shares = np.bincount(first, minlength=10) / len(queries)
    assert np.abs(shares - 0.1).max() < 0.01
    first = chosen("weighted", count=1, queries=tuple(queries))[:, 0]
    weights = np.exp(np.linspace(0.9, 0.1, 10) / 0.2)
    shares = np.bincount(first, minlength=10) / len(queries)
    assert np.abs(shares - weights / weights.sum()).max() < 0.012
