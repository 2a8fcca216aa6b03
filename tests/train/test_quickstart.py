"""configs/quickstart.yaml: the scores it starts from are the published model's."""

from pathlib import Path

import jax
import numpy as np
import pytest
import pytrec_eval

from arcticjax.config import load_config
from arcticjax.models.resolve import resolve
from arcticjax.parallel.mesh import make_mesh
from arcticjax.train import setup

ROOT = Path(__file__).resolve().parents[2]
# trec_eval's names of the three scores, the reciprocal rank over the first ten.
MEASURES = {"ndcg_at_10": "ndcg_cut_10", "mrr_at_10": "recip_rank", "recall_at_100": "recall_100"}


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    config = load_config(
        ROOT / "configs" / "quickstart.yaml",
        [
            f"run.directory={folder / 'run'}",
            "data.docstrings.packages=[etils]",  # what it trains on does not matter here
            "data.docstrings.max_documents=80",
            "train.global_batch=8",
        ],
    )
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        yield setup.prepare(config, mesh)


def test_before_is_the_published_model_in_sentence_transformers(ready):
    from sentence_transformers import SentenceTransformer

    (task,) = ready.evaluator.tasks
    assert 50 < len(task.documents) <= 80
    model = SentenceTransformer(str(resolve(ready.config.model.init)), device="cpu")
    model.max_seq_length = 128
    queries = model.encode(task.queries, normalize_embeddings=True)
    documents = model.encode(task.documents, normalize_embeddings=True)
    wanted = judged(task, queries @ documents.T)
    assert 0.3 < wanted["ndcg_at_10"] < 0.9  # a task that tells models apart

    ready.embedder.params = ready.initial_state()["params"]
    found = ready.evaluator.evaluate()["docstrings"]
    assert found == pytest.approx(wanted, abs=1e-4)


def judged(task, scores) -> dict[str, float]:
    """Means over the queries, by trec_eval on the 1,000 best of each."""
    top = {}
    for query, row in zip(task.query_ids, scores, strict=True):
        best = np.argsort(-row)[:1000]
        top[query] = {task.document_ids[i]: float(row[i]) for i in best}
    full = pytrec_eval.RelevanceEvaluator(task.qrels, {"ndcg_cut.10", "recall.100"}).evaluate(top)
    # trec_eval has no cut for the reciprocal rank: cut the ranking.
    ten = {
        query: dict(sorted(row.items(), key=lambda hit: -hit[1])[:10]) for query, row in top.items()
    }
    rank = pytrec_eval.RelevanceEvaluator(task.qrels, {"recip_rank"}).evaluate(ten)
    return {
        name: float(np.mean([{**full[query], **rank[query]}[measure] for query in top]))
        for name, measure in MEASURES.items()
    }
