"""Metrics equal trec_eval's own code on random and on awkward rankings."""

import ctypes
import math

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from arcticjax.errors import DataError, NumericsError
from arcticjax.scoring.metrics import METRICS, in_trec_order, score

IDS = ["d1", "d10", "d2", "D2", "é", "日本", "😀", "\uff5e", "x y"] + [f"n{i}" for i in range(140)]


def single(value):
    """`value` as a C float."""
    return ctypes.c_float(value).value


def trec_eval(ranked, qrels):
    """The same three numbers by trec_eval; its own top 10 stand in for a cut-off of recip_rank."""
    judged = {query: grades for query, grades in qrels.items() if grades}
    run = {query: dict(ranked.get(query, ())) for query in judged}
    # A query with negative grades only makes trec_eval write outside its counts per grade; a zero
    # for a document that no one ranks keeps it sound and changes no metric.
    padded = {query: {"nowhere": 0, **grades} for query, grades in judged.items()}
    judge = pytrec_eval.RelevanceEvaluator(padded, {"ndcg_cut.10", "recip_rank", "recall.100"})
    whole = judge.evaluate(run)
    top = {
        query: dict(
            sorted(hits.items(), key=lambda h: (single(h[1]), h[0].encode()), reverse=True)[:10]
        )
        for query, hits in run.items()
    }
    cut = judge.evaluate(top)
    assert {q: v["ndcg_cut_10"] for q, v in cut.items()} == {
        q: v["ndcg_cut_10"] for q, v in whole.items()
    }
    return {
        "ndcg_at_10": np.mean([whole[q]["ndcg_cut_10"] for q in judged]),
        "mrr_at_10": np.mean([cut[q]["recip_rank"] for q in judged]),
        "recall_at_100": np.mean([whole[q]["recall_100"] for q in judged]),
    }


def assert_equal_to_trec_eval(ranked, qrels):
    found, expected = score(ranked, qrels), trec_eval(ranked, qrels)
    assert tuple(found) == METRICS
    for name in METRICS:
        assert math.isclose(found[name], expected[name], rel_tol=1e-12, abs_tol=1e-15), name


# Few distinct values make ties; the last two differ in float64 only, so trec_eval ties them too.
SCORES = st.sampled_from([0.0, 0.25, -0.5, 0.5, 0.5 + 1e-12, 1 / 3, 1e300, -1e300]) | st.floats(
    -1, 1, width=32
)


@st.composite
def problems(draw):
    queries = [f"q{i}" for i in range(draw(st.integers(1, 4)))]
    ranked, qrels = {}, {}
    for query in queries:
        size = draw(st.sampled_from([0, 1, 3, 9, 10, 11, 40, 120]))
        seed = draw(st.integers(0, 2**32 - 1))
        names = np.random.default_rng(seed).permutation(IDS)[:size].tolist()
        few = draw(st.lists(SCORES, min_size=1, max_size=6))
        ranked[query] = [(n, few[i * 7 % len(few)]) for i, n in enumerate(names)]
        pool = st.sampled_from(names + IDS[:12]) if names else st.sampled_from(IDS)
        qrels[query] = draw(st.dictionaries(pool, st.integers(-2, 4), max_size=25))
    ranked["never judged"] = [("d1", 1.0)]
    return ranked, qrels


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems())
def test_equal_to_trec_eval_on_random_rankings(problem):
    ranked, qrels = problem
    if not any(qrels.values()):
        with pytest.raises(DataError, match="no query has a judgement"):
            score(ranked, qrels)
        return
    assert_equal_to_trec_eval(ranked, qrels)


def test_equal_to_trec_eval_on_a_large_continuous_ranking():
    rng = np.random.default_rng(3)
    names = [f"d{i}" for i in range(400)]
    qrels = {
        f"q{q}": {n: int(g) for n, g in zip(names, rng.integers(0, 4, 400), strict=True) if g < 3}
        for q in range(20)
    }
    ranked = {
        q: [(n, float(s)) for n, s in zip(names, rng.standard_normal(400), strict=True)]
        for q in qrels
    }
    assert_equal_to_trec_eval(ranked, qrels)


def test_ties_fall_to_the_greater_document_id_at_single_precision():
    hits = [("a", 1.0 + 1e-9), ("b", 1.0), ("é", 0.5), ("😀", 0.5), ("\uff5e", 0.5)]
    assert in_trec_order("q", hits) == ["b", "a", "😀", "\uff5e", "é"]
    assert_equal_to_trec_eval({"q": hits}, {"q": {"a": 1, "é": 2}})


def test_known_values_by_hand():
    ranked = {"q": [("miss", 3.0), ("two", 2.0), ("one", 1.0)]}
    found = score(ranked, {"q": {"two": 2, "one": 1, "absent": 1, "bad": 0}})
    gain = 2 / math.log2(3) + 1 / math.log2(4)
    best = 2 + 1 / math.log2(3) + 1 / math.log2(4)
    assert found == pytest.approx(
        {"ndcg_at_10": gain / best, "mrr_at_10": 0.5, "recall_at_100": 2 / 3}
    )


def test_cut_offs_are_at_ten_and_one_hundred():
    hits = [(f"d{i:03}", float(-i)) for i in range(120)]
    eleventh = score({"q": hits}, {"q": {"d010": 1, "d099": 1, "d100": 1}})
    assert eleventh == {"ndcg_at_10": 0.0, "mrr_at_10": 0.0, "recall_at_100": 2 / 3}
    tenth = score({"q": hits}, {"q": {"d009": 1}})
    assert tenth["mrr_at_10"] == 0.1
    assert tenth["ndcg_at_10"] == pytest.approx(1 / math.log2(11))


def test_judged_queries_without_relevant_documents_or_ranking_count_as_zero():
    ranked = {"hit": [("d", 1.0)], "zero": [("d", 1.0)]}
    qrels = {"hit": {"d": 1}, "zero": {"d": 0}, "lost": {"d": 1}, "unjudged": {}}
    assert score(ranked, qrels)["ndcg_at_10"] == pytest.approx(1 / 3)
    assert_equal_to_trec_eval(ranked, qrels)


def test_refuses_what_has_no_order():
    with pytest.raises(NumericsError, match=r"'q'.*'b' is not a number"):
        score({"q": [("a", 1.0), ("b", math.nan)]}, {"q": {"a": 1}})
    with pytest.raises(DataError, match="'a' is ranked more than once"):
        score({"q": [("a", 1.0), ("a", 0.5)]}, {"q": {"a": 1}})
    with pytest.raises(DataError, match="no query has a judgement"):
        score({"q": [("a", 1.0)]}, {"q": {}})
