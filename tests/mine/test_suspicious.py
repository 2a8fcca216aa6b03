"""The list of suspicious candidates, and back as scores."""

import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from arcticjax.data import candidates
from arcticjax.data.stored import text_id
from arcticjax.errors import ConfigError, DataError
from arcticjax.mine import __main__ as command
from arcticjax.scoring.beir import Task, write_task
from tests.data import candidate_files
from tests.mine import making
from tests.mine.test_derive import folder, read

# One query of several positives, one of which nothing is suspicious.
PAIRS = [
    ("who?", "Ada Lovelace"),
    ("who?", "the Countess"),
    ("when?", "in 1843"),
    ("where?", "It was Ada Lovelace, they say."),
    ("what?", "ada  lovelace!"),
    ("how?", "by hand"),
]
LISTS = {
    "who?": (
        [("by hand", 0.91), ("It was Ada Lovelace, they say.", 0.8), ("in 1843", 0.7),
         ("ada  lovelace!", 0.6)],
        [("Ada Lovelace", 0.9), ("the Countess", 0.5)],
    ),
    "when?": ([("by hand", 0.3)], [("in 1843", 0.4)]),
}  # fmt: skip
EXPECTED = [
    ("who?", "Ada Lovelace", 0.9, ["positive"]),
    ("who?", "the Countess", 0.5, ["positive"]),
    ("who?", "by hand", 0.91, ["above the positive"]),
    ("who?", "It was Ada Lovelace, they say.", 0.8, ["contains the answer"]),
    ("who?", "ada  lovelace!", 0.6, ["same text"]),
]


def by_ids(ids):
    return {
        ids(query): tuple([(ids(text), score) for text, score in side] for side in sides)
        for query, sides in LISTS.items()
    }


def noting(mined, **fields):
    """Lets a folder say where its inputs are."""
    file = mined / candidates.MANIFEST
    manifest = {**json.loads(file.read_text()), "inputs": [{"name": "a", **fields}]}
    file.write_text(json.dumps(manifest))
    return mined


@pytest.fixture
def mined(tmp_path):
    rows = [dict(zip(("query", "document"), pair, strict=True)) for pair in PAIRS]
    file = candidate_files.jsonl(tmp_path / "a.jsonl", rows)
    return noting(folder(tmp_path / "mined", by_ids(text_id)), path=str(file))


def listed(source, output, *options):
    command.main(["--suspicious", str(source), "--output", str(output), *options])
    return parquet.read_table(output).to_pylist()


def shown(rows):
    columns = ("query", "document", "score", "signs")
    return [tuple(row[name] if name != "score" else round(row[name], 4) for name in columns)
            for row in rows]  # fmt: skip


def test_suspicious_candidates_with_their_texts(tmp_path, mined, capsys):
    rows = listed(mined, tmp_path / "s.parquet")
    assert shown(rows) == EXPECTED
    assert {text_id(row["query"]) for row in rows} == {rows[0]["query_id"]}
    assert all(text_id(row["document"]) == row["document_id"] for row in rows)
    assert "3 suspicious candidates of 1 queries" in capsys.readouterr().out
    assert shown(listed(mined, tmp_path / "t.parquet", "--depth", "2")) == EXPECTED[:4]


def test_their_scores_go_back_into_the_folder(tmp_path, mined):
    """As the script in docs/mining.md does it: the column of scores is replaced."""
    listed(mined, tmp_path / "s.parquet")
    table = parquet.read_table(tmp_path / "s.parquet")
    place = table.schema.get_field_index("score")
    scores = [[-0.25, 0.75, 0.125, 0.5, 0.25]]
    table = table.set_column(place, "score", scores)
    parquet.write_table(table, tmp_path / "scored.parquet")
    arguments = ["--relabel", str(mined), str(tmp_path / "scored.parquet")]
    command.main([*arguments, "--output", str(tmp_path / "new")])
    expected = {
        "who?": (
            [("in 1843", 0.7), ("It was Ada Lovelace, they say.", 0.5), ("ada  lovelace!", 0.25),
             ("by hand", 0.125)],
            [("the Countess", 0.75), ("Ada Lovelace", -0.25)],
        ),
        "when?": LISTS["when?"],
    }  # fmt: skip
    assert read(tmp_path / "new") == {
        text_id(query): tuple([(text_id(text), score) for text, score in side] for side in sides)
        for query, sides in expected.items()
    }


def test_the_script_of_the_docs(tmp_path, mined, monkeypatch):
    """A cross-encoder's scores, here how many different letters there are, on the teacher's scale:
    the positives keep their mean and spread."""
    listed(mined, tmp_path / "suspicious.parquet")

    class CrossEncoder:
        def __init__(self, name):
            assert "/" in name

        def predict(self, pairs, batch_size, activation_fn):
            assert isinstance(activation_fn, Identity)
            return np.array([len(set(document)) for _, document in pairs], np.float32)

    class Identity: ...

    for name, value in (("sentence_transformers", CrossEncoder), ("torch.nn", Identity)):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**{value.__name__: value}))
    monkeypatch.chdir(tmp_path)
    page = (Path(making.ROOT) / "docs" / "mining.md").read_text()
    (script,) = re.findall(r"```python\n(import numpy.*?)```", page, re.DOTALL)
    exec(script, {})
    command.main(["--relabel", "mined", "scored.parquet", "--output", "new"])
    others, known = (dict(side) for side in read(tmp_path / "new")[text_id("who?")])
    # 10 and 9 letters of the positives become 0.9 and 0.5.
    assert known == {text_id("Ada Lovelace"): 0.9, text_id("the Countess"): 0.5}
    assert others == {
        text_id("It was Ada Lovelace, they say."): 4.1,
        text_id("in 1843"): 0.7,
        text_id("ada  lovelace!"): 0.5,
        text_id("by hand"): -0.3,
    }


def test_suspicious_candidates_of_a_beir_folder(tmp_path):
    documents = list(dict.fromkeys(document for _, document in PAIRS))
    queries = list(LISTS)
    qrels = {query: {f"d-{text}": 1 for text, _ in LISTS[query][1]} for query in queries}
    task = Task("t", [f"d-{one}" for one in documents], documents, queries, queries, qrels)
    write_task(tmp_path / "task", task)
    lists = {
        query: tuple([(f"d-{text}", score) for text, score in side] for side in sides)
        for query, sides in LISTS.items()
    }
    mined = noting(folder(tmp_path / "mined", lists, kind="own"), path=str(tmp_path / "task"))
    rows = listed(mined, tmp_path / "s.parquet")
    assert shown(rows) == EXPECTED
    assert [row["document_id"] for row in rows] == [f"d-{row['document']}" for row in rows]


def test_texts_of_a_corpus_beside_the_pairs(tmp_path, mined):
    corpus = candidate_files.jsonl(tmp_path / "c.jsonl", [{"text": text} for _, text in PAIRS[3:]])
    rows = [dict(zip(("query", "document"), pair, strict=True)) for pair in PAIRS[:3]]
    file = candidate_files.jsonl(tmp_path / "a.jsonl", rows)
    noting(mined, path=str(file), corpus=str(corpus))
    assert shown(listed(mined, tmp_path / "s.parquet")) == EXPECTED


def test_inputs_that_have_moved(tmp_path, mined):
    file = (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="no such file"):
        listed(mined, tmp_path / "s.parquet")
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"teacher": "t", "output": "o", "input": str(file)}))
    with pytest.raises(ConfigError, match="does not say where its input 'a' is"):
        listed(mined, tmp_path / "s.parquet", "--config", str(config))
    inputs = [{"name": "a", "path": str(file)}]
    config.write_text(json.dumps({"teacher": "t", "output": "o", "input": inputs}))
    assert shown(listed(mined, tmp_path / "s.parquet", "--config", str(config))) == EXPECTED


def test_what_cannot_be_listed(tmp_path, mined):
    output = tmp_path / "s.parquet"
    with pytest.raises(ConfigError, match=r"--output FILE\.parquet is missing"):
        command.main(["--suspicious", str(mined)])
    with pytest.raises(ConfigError, match="has no 'b'; it has a"):
        listed(mined, output, "--group", "b")
    with pytest.raises(ConfigError, match="--depth: 0 is not 1 or more"):
        listed(mined, output, "--depth", "0")
    with pytest.raises(ConfigError, match="is there already"):
        listed(mined, mined)
    candidate_files.jsonl(tmp_path / "a.jsonl", [{"query": "who?", "document": "in 1843"}])
    with pytest.raises(DataError, match="lack 6 texts that were mined"):
        listed(mined, output)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.jsonl", "mined"]
