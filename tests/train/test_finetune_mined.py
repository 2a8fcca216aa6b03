"""From a BEIR folder to candidates to a fine-tuned model, as typed."""

import json
import re

import pytest

from arcticjax import errors
from arcticjax.data import candidates
from arcticjax.mine import __main__ as mining
from tests import tiny
from tests.mine import making
from tests.train.running import UNSCORED, fails, lines, train

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quick_compiler):
    """A BEIR folder whose documents are pieces of pages, four of each, and its candidates."""
    folder = tmp_path_factory.mktemp("mined")
    source = f"beir:{folder / 'task'}?split=train"
    file = making.config_file(folder, input=[{"name": "task", "path": source}])
    (folder / "task" / "qrels").mkdir()
    (folder / "task" / "qrels.tsv").rename(folder / "task" / "qrels" / "train.tsv")
    corpus = folder / "task" / "corpus.jsonl"
    records = [json.loads(line) for line in corpus.read_text().splitlines()]
    pages = [{**one, "page": f"page {n // 4}"} for n, one in enumerate(records)]
    corpus.write_text("".join(json.dumps(one) + "\n" for one in pages))
    mining.main(["--config", str(file)])
    return folder


def config(folder, **fields):
    source = {
        "name": "task",
        "path": f"beir:{folder / 'task'}?split=train",
        "candidates": str(folder / "out"),
        **fields,
    }
    changes = {
        "data.sources": [source],
        "data.negatives": {
            "count": 2,
            "minimum": 1,
            "thresholds": {"upper": {"kind": "percent", "value": 1.0}},
        },
        "loss.in_batch_negatives": False,
        "train.global_batch": 8,
        "train.total_steps": 6,
    }
    return tiny.run_config(folder, **changes, **UNSCORED)


def test_candidates_of_a_beir_folder_are_trained_on(folder):
    """Of equal queries one is trained on, and no piece of a positive's page is a negative."""
    train(config(folder, parents=["page"]))
    found = lines(folder)
    assert [one["step"] for one in found] == [1, 2, 3, 4, 5, 6]
    assert found[-1]["loss"] < found[0]["loss"]

    opened = candidates.open_candidates(folder / "out")
    mined = opened.read(opened.group_of("task"))
    corpus = (folder / "task" / "corpus.jsonl").read_text().splitlines()
    pages = {one["_id"]: one["page"] for one in map(json.loads, corpus)}
    siblings, eligible = 0, 0
    for query in range(len(mined)):
        if mined.query_ids[query] == "q07":
            continue  # q-twin has its text and comes first
        first, last = mined.positive_starts[query : query + 2]
        own = {pages[one] for one in mined.positive_ids[first:last]}
        best = mined.positive_scores[first]
        first, last = mined.candidate_starts[query : query + 2]
        ids, scores = mined.candidate_ids[first:last], mined.candidate_scores[first:last]
        siblings += sum(pages[one] in own for one in ids)
        eligible += sum(
            pages[one] not in own and score <= best for one, score in zip(ids, scores, strict=True)
        )
    said = (folder / "run" / "train.log").read_text()
    counts = re.search(r"cut      task: (\d+) of 40 queries kept .*", said)
    assert counts is not None and 0 < int(counts[1]) < 40
    assert f"{eligible} of" in counts[0] and f"{siblings} of a positive's own document" in counts[0]
    assert siblings > 0


def test_a_key_that_no_document_has_is_refused(folder, tmp_path):
    file = config(folder, parents=["chapter"])
    message = "no document in .*task has the key 'chapter' that parents names"
    fails(file, errors.DataError, message, f"run.directory={tmp_path / 'run'}")
