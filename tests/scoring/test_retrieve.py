"""Evaluation embeds what is judged, searches everything, and scores by id."""

import numpy as np
import pytest
import pytrec_eval

from arcticjax.errors import DataError, NumericsError
from arcticjax.scoring.beir import Task
from arcticjax.scoring.retrieve import evaluate


def exact(queries_QD, documents_TD, k):
    scores_QT = queries_QD @ documents_TD.T
    indices_Qk = np.argsort(-scores_QT, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores_QT, indices_Qk, axis=1), indices_Qk


def random_problem(documents=150, queries=12):
    """A task whose texts are numbers, and an embedding that looks their vectors up."""
    rng = np.random.default_rng(0)
    vectors = {
        "document": rng.standard_normal((documents, 8)).astype(np.float32),
        "query": rng.standard_normal((queries, 8)).astype(np.float32),
    }
    task = Task(
        name="random",
        document_ids=[f"{i}" for i in range(documents)],  # the same ids as the queries'
        documents=[f"{i}" for i in range(documents)],
        query_ids=[f"{i}" for i in range(queries)],
        queries=[f"{i}" for i in range(queries)],
        qrels={
            f"{q}": {f"{d}": int(rng.integers(0, 3)) for d in rng.permutation(documents)[:9]}
            for q in range(0, queries, 2)
        },
    )
    asked = []

    def embed(texts, prompt):
        asked.append((prompt, list(texts)))
        return vectors[prompt][[int(text) for text in texts]]

    return task, embed, vectors, asked


def test_scores_equal_trec_eval_on_the_full_matrix():
    task, embed, vectors, asked = random_problem()
    found = evaluate(task, embed, exact)
    scores_QT = vectors["query"] @ vectors["document"].T
    run = {q: {d: float(scores_QT[int(q), int(d)]) for d in task.document_ids} for q in task.qrels}
    judge = pytrec_eval.RelevanceEvaluator(task.qrels, {"ndcg_cut.10", "recall.100"})
    expected = judge.evaluate(run)
    assert found.task == "random"
    assert found.metrics["ndcg_at_10"] == pytest.approx(
        np.mean([row["ndcg_cut_10"] for row in expected.values()]), rel=1e-12
    )
    assert found.metrics["recall_at_100"] == pytest.approx(
        np.mean([row["recall_100"] for row in expected.values()]), rel=1e-12
    )
    assert 0 < found.metrics["recall_at_100"] < 1
    # Only judged queries are embedded, each side with its own prompt.
    assert dict(asked) == {"query": list(task.qrels), "document": task.documents}


def test_ranked_holds_ids_best_first_and_no_more_than_there_are():
    task, embed, vectors, _ = random_problem(documents=5, queries=3)
    task = Task(**{**vars(task), "qrels": {"1": {"1": 1}}})
    ranked = evaluate(task, embed, exact).ranked
    scores_T = vectors["document"] @ vectors["query"][1]
    order = np.argsort(-scores_T)
    assert list(ranked) == ["1"]
    assert [name for name, _ in ranked["1"]] == [str(i) for i in order]
    np.testing.assert_allclose([s for _, s in ranked["1"]], scores_T[order], rtol=1e-6)


def test_refuses_non_finite_embeddings_naming_the_text():
    task, embed, vectors, _ = random_problem()
    vectors["document"][7, 3] = np.nan
    with pytest.raises(NumericsError, match=r"1 of 150 document embeddings.*first is '7'"):
        evaluate(task, embed, exact)
    vectors["query"][4] = np.inf
    with pytest.raises(NumericsError, match=r"1 of 6 query embeddings.*first is '4'"):
        evaluate(task, embed, exact)


def test_refuses_a_task_without_judgements_before_embedding():
    task, embed, _, asked = random_problem()
    with pytest.raises(DataError, match="no query has a judgement"):
        evaluate(Task(**{**vars(task), "qrels": {"0": {}}}), embed, exact)
    assert asked == []


def test_refuses_functions_that_break_their_contract():
    task, embed, _, _ = random_problem()
    with pytest.raises(ValueError, match=r"embed returned shape \(5, 8\) for 6 texts"):
        evaluate(task, lambda texts, prompt: embed(texts, prompt)[1:], exact)
    with pytest.raises(ValueError, match=r"expected \(6, 100\) twice"):
        evaluate(task, embed, lambda q, d, k: exact(q, d, k + 1))
    with pytest.raises(ValueError, match="index outside the 150 documents"):
        evaluate(task, embed, lambda q, d, k: (exact(q, d, k)[0], exact(q, d, k)[1] + 60))
