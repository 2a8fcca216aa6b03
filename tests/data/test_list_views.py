"""Lists as a run sees them: cut when drawn, by thresholds that move, and merged."""

import numpy as np
import pytest

from arcticjax.data.list_views import ListView
from arcticjax.errors import DataError
from tests import tiny
from tests.data import candidate_files
from tests.data.known_lists import DOCUMENTS, QUERIES, policy


@pytest.fixture
def scored(tmp_path, opened):
    """Lists of 48 queries with scores from 0.2 to 0.9."""
    file = candidate_files.jsonl(tmp_path / "a.jsonl", candidate_files.records(0, 48))
    return opened(
        path=str(file), document="pos", negatives=["neg"], scores=["pos_scores", "neg_scores"]
    )


def upper(value, kind="absolute"):
    return {"upper": {"kind": kind, "value": value}}


def test_a_view_holds_the_queries_that_have_enough(scored):
    strict = ListView("one", [scored], policy(count=3, thresholds=upper(0.6)))
    loose = ListView("one", [scored], policy(count=3, thresholds=upper(0.85)))
    assert 0 < len(strict) < len(loose) <= 48
    selected = strict.select(np.arange(len(strict)), 0, 0.0)
    assert (selected.documents_BC >= 0).all()
    assert selected.scores_BC[:, 1:].max() <= 0.6
    assert strict.yields[0].kept == len(strict)


def test_uses_of_a_query_have_other_negatives(scored):
    view = ListView("one", [scored], policy(count=2, uses=2))
    half = len(view) // 2
    first, second = (view.select(np.arange(start, start + half), 0, 0.0) for start in (0, half))
    assert np.array_equal(first.query_ids_B, second.query_ids_B)
    for one, two in zip(first.documents_BC[:, 1:], second.documents_BC[:, 1:], strict=True):
        assert not set(one.tolist()) & set(two.tolist())


def test_a_curriculum_cuts_by_the_share_of_the_run(scored):
    curriculum = {"points": [{"start": 0.0, "upper": 0.5}, {"start": 0.5, "upper": 0.9}]}
    fields = {"count": 1, "thresholds": upper(0.9), "curriculum": curriculum}
    view = ListView("one", [scored], policy(**fields))
    hardest = [
        view.select(np.arange(len(view)), 0, progress).scores_BC[:, 1].max()
        for progress in (0.0, 0.49, 0.5, 0.99)
    ]
    assert hardest[0] == hardest[1] <= 0.5 < hardest[2] == hardest[3] <= 0.9
    assert len(view.yields) == 2 and view.yields[0].kept < view.yields[1].kept

    fields["curriculum"] = {**curriculum, "shape": "linear", "levels": 4}
    found = policy(**fields)
    limits = [found.cut_at(progress).upper for progress in (0, 0.124, 0.125, 0.375, 0.5, 1)]
    values = [limit.value for limit in limits if limit is not None]
    np.testing.assert_allclose(values, [0.5, 0.5, 0.6, 0.8, 0.9, 0.9])


def test_random_negatives_change_by_epoch_and_seed_alone(scored):
    view = ListView("one", [scored], policy(count=2, sampling="random"))
    first = view.select(np.arange(8), 0, 0.0).documents_BC
    assert np.array_equal(view.select(np.arange(4, 8), 0, 0.9).documents_BC, first[4:])
    assert not np.array_equal(view.select(np.arange(8), 1, 0.0).documents_BC, first)
    other = ListView("one", [scored], policy(count=2, sampling="random", seed=1))
    assert not np.array_equal(other.select(np.arange(8), 0, 0.0).documents_BC, first)


def test_merged_views_are_the_views_in_turn(scored):
    one = ListView("one", [scored], policy(count=2))
    both = ListView.merged("both", [one, one], None)
    assert len(both) == 2 * len(one)
    records = np.array([3, len(one) + 5, 1])
    together = both.select(records, 0, 0.0)
    alone = one.select(np.array([3, 5, 1]), 0, 0.0)
    assert np.array_equal(together.query_ids_B, alone.query_ids_B)
    for name in ("documents_BC", "known_BP"):
        mine, other = getattr(together, name), getattr(alone, name)
        ids = [
            view.document_ids(np.maximum(some, 0)) for view, some in ((both, mine), (one, other))
        ]
        assert np.array_equal(np.where(mine >= 0, ids[0], 0), np.where(other >= 0, ids[1], 0))
    tokens = zip(both.query_tokens(records), one.query_tokens(np.array([3, 5, 1])), strict=True)
    assert all(np.array_equal(a, b) for a, b in tokens)
    documents = together.documents_BC[:, 0]
    pairs = zip(
        both.document_tokens(documents), one.document_tokens(alone.documents_BC[:, 0]), strict=True
    )
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_too_few_negatives_is_an_error_with_counts(scored):
    with pytest.raises(
        DataError, match=r"no query has 3 hard.*\n.*0 of 48 queries.*48 with too few"
    ):
        ListView("one", [scored], policy(count=3, thresholds=upper(0.1)))


def test_thresholds_need_scores(tmp_path, opened):
    row = {"query": QUERIES[0], "pos": [DOCUMENTS[0]], "neg": [DOCUMENTS[1]]}
    file = candidate_files.jsonl(tmp_path / "a.jsonl", [row])
    found = opened(path=str(file), document="pos", negatives=["neg"])
    with pytest.raises(DataError, match="need a teacher's scores"):
        ListView("one", [found], policy(count=1, thresholds=upper(0.5)))
    with pytest.raises(DataError, match="need a teacher's scores"):
        ListView("one", [found], policy(count=1, sampling="weighted"))
    assert len(ListView("one", [found], policy(count=1))) == 1


def test_near_duplicates_of_a_positive_are_left_out(tmp_path, opened):
    words = [" ".join(tiny.WORDS[start : start + 30]) for start in (0, 1, 10)]
    row = {"query": QUERIES[0], "pos": words[:1], "neg": words[1:]}
    file = candidate_files.jsonl(tmp_path / "a.jsonl", [row])
    found = opened(path=str(file), document="pos", negatives=["neg"])
    all_of_them = ListView("one", [found], policy(count=2))
    assert all_of_them.yields[0].eligible == 2
    some = ListView("one", [found], policy(count=1, near_duplicates=0.7))
    assert some.yields[0].duplicates == 1
    assert some.select(np.array([0]), 0, 0.0).documents_BC.tolist() == [[0, 2]]
