"""Mined candidates on disk: what is written is read, and what is not whole is refused."""

import json

import numpy as np
import pyarrow.parquet
import pytest

from arcticjax.data import candidates, record_files
from arcticjax.errors import DataError


def lists(kind, queries=3, first=0):
    """Query q has q candidates and one positive; ids that need all 64 bits."""

    def ids(values):
        if kind == "text":
            return np.array(values, np.uint64) + np.uint64(2**63)
        return np.array([f"d{value}" for value in values], object)

    counts = np.arange(queries)
    starts = np.concatenate([[0], np.cumsum(counts)])
    return candidates.Candidates(
        ids(np.arange(first, first + queries)),
        ids(np.arange(starts[-1])),
        np.linspace(1, -1, starts[-1], dtype=np.float32),
        starts,
        ids(np.arange(100, 100 + queries)),
        np.full(queries, 0.5, np.float32),
        np.arange(queries + 1),
    )


def same(left, right):
    for name, value in vars(left).items():
        np.testing.assert_array_equal(value, getattr(right, name), err_msg=name)


def folder(path, kind="text", shards=1, queries=3):
    path.mkdir(exist_ok=True)
    names = [candidates.file_name("a", shard) for shard in range(shards)]
    for shard, name in enumerate(names):
        candidates.write_shard(path / name, lists(kind, queries, first=10 * shard), kind)
    group = {
        "name": "a",
        "sources": ["a", "b"],
        "kind": kind,
        "queries": queries * shards,
        "documents": 9,
        "sha256": "00",
        "files": names,
    }
    manifest = {
        "format": candidates.FORMAT,
        "version": candidates.FORMAT_VERSION,
        "top_k": 5,
        "groups": [group],
        "files": {name: record_files.file_facts(path / name) for name in names},
    }
    (path / candidates.MANIFEST).write_text(json.dumps(manifest))
    return path


@pytest.mark.parametrize("kind", ["text", "own"])
def test_what_is_written_is_read(tmp_path, kind):
    opened = candidates.open_candidates(folder(tmp_path / "c", kind, shards=2), verify=True)
    assert opened.top_k == 5
    group = opened.group_of("b")
    assert (group.kind, group.queries) == (kind, 6)
    found = opened.read(group)
    assert found.query_ids.dtype == (np.uint64 if kind == "text" else object)
    assert found.candidate_scores.dtype == np.float32
    same(found, candidates.concatenate([lists(kind), lists(kind, first=10)]))
    np.testing.assert_array_equal(found.candidate_starts, [0, 0, 1, 3, 3, 4, 6])


def test_a_shard_of_many_queries_is_read_in_parts(tmp_path):
    opened = candidates.open_candidates(folder(tmp_path / "c", queries=1500))
    parts = list(opened.batches(opened.groups[0]))
    assert [len(part) for part in parts] == [1024, 476]
    assert all(part.candidate_starts[0] == 0 for part in parts)
    same(candidates.concatenate(parts), lists("text", 1500))


def test_columns_and_bytes_are_the_contract(tmp_path):
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two")
    name = candidates.file_name("a", 0)
    assert (one / name).read_bytes() == (two / name).read_bytes()
    assert pyarrow.parquet.read_schema(one / name).names == list(candidates.COLUMNS)
    assert (
        candidates.open_candidates(one).fingerprint == candidates.open_candidates(two).fingerprint
    )
    assert sorted(path.name for path in one.iterdir()) == [name, "manifest.json"]


def test_what_is_not_whole_is_refused(tmp_path):
    with pytest.raises(DataError, match="no finished candidates"):
        candidates.open_candidates(tmp_path)
    path = folder(tmp_path / "c")
    with pytest.raises(DataError, match=r"nothing was mined for a source 'c'; it has a, b"):
        candidates.open_candidates(path).group_of("c")
    name = candidates.file_name("a", 0)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-9] + b"xxxxx" + content[-4:])
    candidates.open_candidates(path)
    with pytest.raises(DataError, match="does not match its SHA-256"):
        candidates.open_candidates(path, verify=True)
    (path / name).write_bytes(content[:-1])
    with pytest.raises(DataError, match="torn"):
        candidates.open_candidates(path)
    (path / name).unlink()
    with pytest.raises(DataError, match="missing"):
        candidates.open_candidates(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "another"}, "is not the manifest of mined candidates"),
        ({"version": 2}, "format version 2 is unknown"),
        ({"groups": None}, "lacks or distorts"),
    ],
)
def test_a_foreign_manifest_is_refused(tmp_path, change, message):
    path = folder(tmp_path / "c") / candidates.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        candidates.open_candidates(path.parent)


def test_a_damaged_file_says_so(tmp_path):
    path = folder(tmp_path / "c")
    opened = candidates.open_candidates(path)
    (path / candidates.file_name("a", 0)).write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match="cannot be read as candidates"):
        opened.read(opened.groups[0])
