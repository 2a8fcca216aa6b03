"""MTEB's own evaluation of the Flax encoder, of its export, and of our scoring code: one number."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from arcticjax.errors import ConfigError
from arcticjax.export.source import make_embedder, open_source
from arcticjax.parallel.mesh import make_mesh
from arcticjax.scoring import beir, metrics
from arcticjax.scoring.compression import FULL, Compression
from arcticjax.scoring.retrieve import evaluate_each
from tests import tiny

mteb = pytest.importorskip("mteb")
mteb_tasks = pytest.importorskip("arcticjax.scoring.mteb_tasks")
mteb_encoder = pytest.importorskip("arcticjax.scoring.mteb_encoder")

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("mteb") / "model")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return beir.load_task(tiny.task_folder(tmp_path_factory.mktemp("tasks") / "mine", count=60))


@pytest.fixture(scope="module")
def embedder(folder):
    source = open_source(folder)
    contract = dataclasses.replace(source.contract, query_length=32, query_prompt="river ")
    return make_embedder(dataclasses.replace(source, contract=contract), make_mesh(2))


def scores_of(encoder, task, **options):
    options = {"cache": None, "co2_tracker": False, "show_progress_bar": False} | options
    [result] = mteb.evaluate(encoder, task, **options).task_results
    return result.scores["test"][0]


def test_mteb_and_our_code_agree(embedder, task):
    encoder = mteb_encoder.MtebEncoder(embedder, chunk=7)
    theirs = scores_of(encoder, mteb_tasks.folder_task(task))
    ours = evaluate_each(task, embedder.encode, [FULL], embedder.mesh)[FULL].metrics
    for metric, value in ours.items():
        assert abs(theirs[metric] - value) < 1e-5, metric
    assert 0.05 < ours["ndcg_at_10"] < 0.95


@pytest.mark.filterwarnings(  # of what MTEB calls
    "ignore:The fill_missing parameter:DeprecationWarning",
    "ignore:The `get_sentence_embedding_dimension` method:FutureWarning",
)
def test_the_export_scores_the_same_through_sentence_transformers(folder, task):
    from sentence_transformers import SentenceTransformer

    source = open_source(folder)
    contract = dataclasses.replace(source.contract, query_length=32)
    flax = make_embedder(dataclasses.replace(source, contract=contract), make_mesh(2))
    ours = scores_of(mteb_encoder.MtebEncoder(flax), mteb_tasks.folder_task(task))
    exported = SentenceTransformer(str(folder), device="cpu")
    theirs = scores_of(exported, mteb_tasks.folder_task(task))
    for metric in metrics.METRICS:
        assert abs(ours[metric] - theirs[metric]) < 1e-4, metric


def test_compressions_are_ranked_from_one_encoding(embedder, task):
    kinds = [FULL, Compression.parse("int8@16"), Compression.parse("int4")]
    calls = []
    counted = SimpleNamespace(
        encode=lambda texts, side, encoded: (
            calls.append(len(texts)) or embedder.encode(texts, side)
        ),
        **{name: getattr(embedder, name) for name in ("mesh", "contract", "dimension")},
        fingerprint=embedder.fingerprint,
    )
    encoder = mteb_encoder.MtebEncoder(counted, compressions=kinds, chunk=25)
    scores_of(encoder, mteb_tasks.folder_task(task))
    assert calls == [60, 25, 25, 10]
    [rankings] = encoder.rankings.values()
    wanted = evaluate_each(task, embedder.encode, kinds, embedder.mesh)
    for kind in kinds:
        found = metrics.score(rankings[kind], task.qrels)
        assert found == pytest.approx(wanted[kind].metrics, abs=1e-9), kind
    assert len({tuple(wanted[kind].metrics.values()) for kind in kinds}) == 3


def test_a_cache_never_answers_for_other_weights(tmp_path, embedder, folder, task):
    from mteb.cache import ResultCache

    cache = ResultCache(tmp_path)
    other = make_embedder(
        dataclasses.replace(
            open_source(tiny.model_folder(tmp_path / "other", seed=1)), contract=embedder.contract
        ),
        embedder.mesh,
    )
    found = []
    for one in (embedder, other, embedder):
        encoder = mteb_encoder.MtebEncoder(one, "runs/mine")
        found.append(scores_of(encoder, mteb_tasks.folder_task(task), cache=cache)["ndcg_at_10"])
    assert found[0] == found[2] != found[1]
    assert len(list((tmp_path / "results" / "runs__mine").iterdir())) == 2


def test_the_revision_is_of_all_that_a_vector_depends_on(embedder, folder):
    source = open_source(folder)
    same = make_embedder(dataclasses.replace(source, contract=embedder.contract), make_mesh(1))
    assert same.fingerprint() == embedder.fingerprint() and len(same.fingerprint()) == 40
    shorter = dataclasses.replace(embedder.contract, query_length=31)
    changed = [
        make_embedder(dataclasses.replace(source, contract=shorter), make_mesh(1)),
        make_embedder(
            dataclasses.replace(source, contract=embedder.contract), make_mesh(1), dtype="bfloat16"
        ),
    ]
    same.params["embeddings"]["token"] = same.params["embeddings"]["token"].at[3, 4].add(1e-3)
    revisions = {one.fingerprint() for one in (embedder, same, *changed)}
    assert len(revisions) == 4
    int8 = mteb_encoder.MtebEncoder(embedder, compressions=[Compression(bits=8)])
    assert int8.mteb_model_meta.revision == f"{embedder.fingerprint()}-int8"


class Sides:
    """An embedder that remembers what it was asked for."""

    dimension = 4
    contract = SimpleNamespace(document_length=8, query_prompt="")

    def __init__(self):
        self.mesh = make_mesh(1)
        self.asked = []

    def encode(self, texts, side, encoded=None):
        self.asked.append((side, list(texts)))
        return np.ones((len(texts), 4), np.float32) / 2

    def fingerprint(self):
        return "0" * 40


def corpus(**columns):
    from datasets import Dataset

    return Dataset.from_dict(columns)


@pytest.mark.parametrize(
    "name, side", [("QuoraRetrieval", "query"), ("NanoQuoraRetrieval", "query"), ("NQ", "document")]
)
def test_documents_are_title_and_text_and_quoras_are_queries(name, side):
    sides = Sides()
    encoder = mteb_encoder.MtebEncoder(sides)
    encoder.index(corpus(id=["a", "b", "c"], title=["T", "", None], text=["x ", " y", "z"]))
    found = encoder.search(
        corpus(id=["q"], text=["what"]),
        task_metadata=SimpleNamespace(name=name),
        hf_split="test",
        hf_subset="default",
        top_k=2,
        encode_kwargs={},
        num_proc=None,
    )
    assert sides.asked == [("query", ["what"]), (side, ["T x", "y", "z"])]
    assert list(found["q"]) == ["a", "b"]


def test_texts_without_a_side_are_documents():
    sides = Sides()
    encoder = mteb_encoder.MtebEncoder(sides, chunk=2)
    vectors = encoder.encode(
        [{"text": ["a", "b"]}, {"text": ["c"]}], task_metadata=SimpleNamespace(name="STS12")
    )
    assert vectors.shape == (3, 4)
    assert sides.asked == [("document", ["a", "b"]), ("document", ["c"])]
    assert encoder.similarity_pairwise(vectors, vectors).tolist() == [1.0] * 3


def test_candidates_are_ranked_again_by_mteb(embedder, task):
    named = mteb_tasks.folder_task(task)
    split = named.dataset["default"]["test"]
    split["top_ranked"] = {query: task.document_ids[:3] for query in task.query_ids}
    scores = scores_of(mteb_encoder.MtebEncoder(embedder), named)
    assert scores["recall_at_100"] == pytest.approx(3 / 60, abs=1e-5)


def test_tasks_by_name():
    assert mteb_tasks.named_task("MSMARCO").eval_splits == ["dev"]
    documents, queries, characters = mteb_tasks.size(mteb_tasks.named_task("NFCorpus"))
    assert (documents, queries) == (3633, 323) and characters > 5_000_000
    with pytest.raises(ConfigError, match="Did you mean: 'NFCorpus'"):
        mteb_tasks.named_task("NFCorpu")


def test_every_task_of_the_benchmarks_is_one_of_mtebs():
    from arcticjax.scoring import benchmarks

    tasks = benchmarks.expand([benchmarks.RETRIEVAL_15_NAME, benchmarks.NANO_BEIR_NAME])
    for task in tasks:
        assert mteb_tasks.named_task(task.removeprefix("mteb:")).metadata.type == "Retrieval"
    theirs = {task.metadata.name for task in mteb.get_benchmark("NanoBEIR").tasks}
    assert theirs == set(benchmarks.NANO_BEIR)
