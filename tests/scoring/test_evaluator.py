"""Evaluation on the mesh: what is scored, and how often texts are embedded."""

import jax
import numpy as np
import pytest

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


def test_documents_are_embedded_once_for_one_set_of_parameters(task):
    mesh = meshes.make_mesh(1)

    class Counting:
        dimension = 8
        params = object()
        calls = 0

        def encode(self, texts, side):
            self.calls += side == "document"
            random = np.random.default_rng(0)
            return random.normal(size=(len(texts), 8)).astype(np.float32)

    counting = Counting()
    with jax.set_mesh(mesh):
        evaluator = Evaluator([task], counting, mesh)  # pyright: ignore[reportArgumentType]
        evaluator.evaluate()
        answers = evaluator.best(["chess"], 3)
        assert counting.calls == 1
        counting.params = object()
        evaluator.evaluate()
        assert counting.calls == 2
    assert len(answers) == 1 and len(answers[0][1]) == 3


def test_tasks_by_name(tmp_path):
    folder = tiny.task_folder(tmp_path / "mine")
    made, named = load_tasks(["docstrings", f"beir:{folder}"], {"docstrings": folder})
    assert (made.name, named.name) == ("docstrings", "mine")
