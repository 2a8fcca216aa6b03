"""Candidates made from stored ones, checked list by list."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from arcticjax.data import candidates, record_files
from arcticjax.errors import ConfigError, DataError
from arcticjax.mine import __main__ as command

BIG = 2**63


def folder(path, lists, *, kind="text", top_k=3, sha256="s", teacher="t"):
    """lists: {query: ([(candidate, score)], [(positive, score)])}."""
    path.mkdir()

    def ids(values):
        return np.array(values, np.uint64 if kind == "text" else object)

    sides = []
    for side in (0, 1):
        rows = [row[side] for row in lists.values()]
        flat = [hit for row in rows for hit in row]
        sides += [
            ids([one for one, _ in flat]),
            np.array([score for _, score in flat], np.float32),
            np.cumsum([0, *map(len, rows)]),
        ]
    name = candidates.file_name("a", 0)
    candidates.write_shard(path / name, candidates.Candidates(ids(list(lists)), *sides), kind)
    group = {
        "name": "a", "sources": ["a"], "kind": kind, "queries": len(lists), "documents": 9,
        "sha256": sha256, "files": [name],
    }  # fmt: skip
    manifest = {
        "format": candidates.FORMAT, "version": candidates.FORMAT_VERSION, "top_k": top_k,
        "teacher": {"name": teacher}, "groups": [group],
        "files": {name: record_files.file_facts(path / name)},
    }  # fmt: skip
    (path / candidates.MANIFEST).write_text(json.dumps(manifest))
    return path


def read(path):
    """What `folder` was given, with scores rounded."""
    opened = candidates.open_candidates(path, verify=True)
    found = opened.read(opened.groups[0])

    def row(side, number):
        part = slice(*getattr(found, f"{side}_starts")[number : number + 2])
        scores = getattr(found, f"{side}_scores")[part]
        ids = getattr(found, f"{side}_ids")[part].tolist()
        return [(one, round(float(score), 4)) for one, score in zip(ids, scores, strict=True)]

    return {
        query: (row("candidate", number), row("positive", number))
        for number, query in enumerate(found.query_ids.tolist())
    }


LISTS = {
    1: ([(BIG + 5, 0.9), (BIG + 1, 0.8), (BIG + 3, 0.7)], [(BIG + 2, 0.95)]),
    BIG: ([(BIG + 2, 0.5)], [(BIG + 1, 0.6), (BIG + 3, 0.4)]),
}


def scores_file(path, rows, names=("query_id", "document_id", "score"), ids=None):
    columns = list(zip(*rows, strict=True))
    ids = ids or pyarrow.uint64()
    types = (ids, ids, pyarrow.float64())
    arrays = [pyarrow.array(column, kind) for column, kind in zip(columns, types, strict=True)]
    pyarrow.parquet.write_table(pyarrow.table(arrays, names=list(names)), path)
    return path


def relabel(source, scores, output):
    command.main(["--relabel", str(source), str(scores), "--output", str(output)])


def test_scores_are_replaced_and_lists_sorted_again(tmp_path, capsys):
    source = folder(tmp_path / "a", LISTS)
    rows = [(1, BIG + 5, -0.1), (1, BIG + 3, 0.8), (BIG, BIG + 3, 0.7), (7, 7, 0.1)]
    relabel(source, scores_file(tmp_path / "s.parquet", rows), tmp_path / "b")
    assert "3 scores replaced" in capsys.readouterr().out
    assert read(tmp_path / "b") == {
        1: ([(BIG + 1, 0.8), (BIG + 3, 0.8), (BIG + 5, -0.1)], [(BIG + 2, 0.95)]),
        BIG: ([(BIG + 2, 0.5)], [(BIG + 3, 0.7), (BIG + 1, 0.6)]),
    }
    assert read(source) == LISTS
    assert "relabelled" in candidates.open_candidates(tmp_path / "b").manifest


def test_relabelling_by_own_ids(tmp_path):
    lists = {"q": ([("x", 0.5), ("y", 0.4)], [("z", 0.9)])}
    source = folder(tmp_path / "a", lists, kind="own")
    rows = scores_file(tmp_path / "s.parquet", [("q", "y", 0.6)], ids=pyarrow.string())
    relabel(source, rows, tmp_path / "b")
    assert read(tmp_path / "b") == {"q": ([("y", 0.6), ("x", 0.5)], [("z", 0.9)])}


def test_what_cannot_be_relabelled(tmp_path):
    source = folder(tmp_path / "a", LISTS)
    nothing = scores_file(tmp_path / "s.parquet", [(7, 7, 0.1)])
    with pytest.raises(DataError, match="names no query and document"):
        relabel(source, nothing, tmp_path / "b")
    # Nor is anything left of the copy that was begun.
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a", "s.parquet"]
    lacking = scores_file(tmp_path / "t.parquet", [(1, 1, 0.1)], ("query_id", "id", "score"))
    with pytest.raises(DataError, match="with the columns query_id, document_id, score"):
        relabel(source, lacking, tmp_path / "b")
    empty = scores_file(tmp_path / "u.parquet", [(1, BIG + 5, float("nan"))])
    with pytest.raises(DataError, match="row 1: an id or the score is missing or not finite"):
        relabel(source, empty, tmp_path / "b")
    good = scores_file(tmp_path / "v.parquet", [(1, BIG + 5, 0.1)])
    with pytest.raises(ConfigError, match="holds candidates already"):
        relabel(source, good, source)
    with pytest.raises(ConfigError, match="--output DIR is missing"):
        command.main(["--relabel", str(source), str(good)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    with pytest.raises(ConfigError, match="is no empty folder"):
        relabel(source, good, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    relabel(source, good, tmp_path / "empty")
    assert (tmp_path / "empty" / candidates.MANIFEST).exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--relabel", "a", "s", "--merge", "a"], "--merge: not allowed with argument --relabel"),
        (["--sweep", "--plan", "3/3"], "--plan: not allowed with argument --sweep"),
        (["--suspicious", "a", "--sweep"], "--sweep: not allowed with argument --suspicious"),
        (["--relabel", "a", "s", "--config", "c"], "--config: --relabel reads no config"),
        (["--merge", "a", "--set", "top_k=3"], "--set: --merge reads no config"),
        (["--sweep", "--output", "a", "--set", "top_k=3"], "--set replaces fields of a config"),
        (["--sweep", "--depth", "3"], "--depth goes with --suspicious alone"),
        (["--config", "c", "--negatives", "3"], "--negatives goes with --sweep alone"),
        (["--config", "c", "--topology", "v5e:2x4"], "--topology goes with --plan alone"),
    ],
)
def test_options_that_would_not_be_looked_at(options, problem):
    with pytest.raises(ConfigError, match=problem):
        command.main(options)


def test_teachers_are_merged(tmp_path):
    other = {
        1: ([(BIG + 1, 0.6), (BIG + 4, 0.2)], [(BIG + 2, 0.55)]),
        BIG: ([], [(BIG + 3, 0.8), (BIG + 1, 0.0)]),
    }
    one = folder(tmp_path / "one", LISTS, teacher="x")
    two = folder(tmp_path / "two", other, teacher="y", top_k=5)
    command.main(["--merge", str(one), str(two), "--output", str(tmp_path / "both")])
    assert read(tmp_path / "both") == {
        1: (
            # 5 and 3 count with the second teacher's last score, 4 with the first one's.
            [(BIG + 1, 0.7), (BIG + 5, 0.55), (BIG + 3, 0.45), (BIG + 4, 0.45)],
            [(BIG + 2, 0.75)],
        ),
        BIG: ([(BIG + 2, 0.5)], [(BIG + 3, 0.6), (BIG + 1, 0.3)]),
    }
    manifest = candidates.open_candidates(tmp_path / "both").manifest
    assert (manifest["top_k"], manifest["teacher"]["name"]) == (5, "x + y")


def test_only_the_same_texts_are_merged(tmp_path):
    one, two = folder(tmp_path / "one", LISTS), folder(tmp_path / "two", LISTS, sha256="other")
    with pytest.raises(ConfigError, match="was mined from other inputs"):
        command.main(["--merge", str(one), str(two), "--output", str(tmp_path / "both")])
