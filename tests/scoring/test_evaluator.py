"""Evaluation on the mesh: what is scored, and how often texts are embedded."""

import dataclasses

import jax
import numpy as np
import pytest

from arcticjax.errors import ConfigError
from arcticjax.parallel import mesh as meshes
from arcticjax.scoring.beir import Task
from arcticjax.scoring.evaluator import Evaluator, load_tasks
from tests import tiny

SUBJECTS = [
    "glacier",
    "violin",
    "tax law",
    "sourdough",
    "black hole",
    "honey bee",
    "chess",
    "malaria",
]
FACTS = [
    "The {} was described in detail by early travellers and is still studied.",
    "Few people know how a {} came to matter so much to trade.",
    "In short, every guide to the {} starts with its history.",
    "What makes the {} unusual is how slowly it changes.",
    "A museum of the {} opened last year, to mixed reviews.",
]


@pytest.fixture(scope="module")
def task():
    documents = [fact.format(subject) for subject in SUBJECTS for fact in FACTS]
    queries = [f"how did the {s} change trade" for s in SUBJECTS] + [
        f"{s} museum" for s in SUBJECTS
    ]
    qrels = {f"q{n}": {f"d{5 * (n % 8) + n % 5}": 1} for n in range(16)}
    return Task("facts", [f"d{n}" for n in range(40)], documents, list(qrels), queries, qrels)


class Counting:
    """An embedder of random vectors, unlike for texts of unlike number."""

    dimension = 8

    def __init__(self):
        self.params = object()
        self.calls = 0

    def encode(self, texts, side):
        self.calls += side == "document"
        random = np.random.default_rng(len(texts))
        return random.normal(size=(len(texts), 8)).astype(np.float32)


def test_documents_are_embedded_once_for_one_set_of_parameters(task):
    mesh = meshes.make_mesh(1)
    counting = Counting()
    with jax.set_mesh(mesh):
        evaluator = Evaluator([task], counting, mesh)  # pyright: ignore[reportArgumentType]
        evaluator.evaluate()
        answers = evaluator.best(["chess", "violin"], 3)
        assert counting.calls == 1
        cosines = (
            counting.encode(["chess", "violin"], "query")
            @ counting.encode(task.documents, "query").T
        )
        counting.params = object()
        evaluator.evaluate()
        assert counting.calls == 2
    assert [query for query, _ in answers] == ["chess", "violin"]
    for (_, found), row in zip(answers, cosines, strict=True):
        best = np.argsort(-row)[:3]
        assert [document for _, document in found] == [task.documents[n] for n in best]
        np.testing.assert_allclose([score for score, _ in found], row[best], rtol=1e-5)


def test_tasks_by_name(tmp_path):
    folder = tiny.task_folder(tmp_path / "mine")
    made, named = load_tasks(["docstrings", f"beir:{folder}"], {"docstrings": folder})
    assert (made.name, named.name) == ("docstrings", "mine")


def test_tasks_of_one_name_do_not_share_their_documents(task):
    mesh = meshes.make_mesh(1)
    longer = dataclasses.replace(task, document_ids=[*task.document_ids, "d40"],
                                documents=[*task.documents, "one more"])  # fmt: skip
    with jax.set_mesh(mesh):
        evaluator = Evaluator([task, longer], counting := Counting(), mesh)  # pyright: ignore
        evaluator.evaluate()
    assert counting.calls == 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("beir:{0}/x/dev", "beir:{0}/y/dev"),
        ("beir:{0}/x/dev", "beir:{0}/x/dev/"),
        ("docstrings", "beir:{0}/docstrings"),
    ],
)
def test_two_tasks_of_one_name_are_refused(tmp_path, first, second):
    first, second = first.format(tmp_path), second.format(tmp_path)
    for folder in ("x/dev", "y/dev", "docstrings"):
        tiny.task_folder(tmp_path / folder, count=2)
    with pytest.raises(ConfigError) as caught:
        load_tasks([first, second], {"docstrings": tmp_path / "x" / "dev"})
    assert f"{first} and {second} are both called" in str(caught.value)


def test_a_task_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.task_folder(tmp_path / "mine", count=2)
    assert [task.name for task in load_tasks(["beir:~/mine"], {})] == ["mine"]
