"""Records that are no pair of texts, left out: which, how many, and where it ends."""

import gzip
import json
import logging

import pyarrow as pa
import pytest
from pyarrow import parquet

from arcticjax.config.schema import SourceConfig
from arcticjax.data import adapters
from arcticjax.data.bad_records import BadRecords
from arcticjax.errors import DataError

BAD_LINES = [
    b'{"query": "a\xff", "document": "b"}',  # not UTF-8
    b'{"query": "a", "document": ',  # cut off
    b"[1, 2]",
    b'{"query": "a"}',  # no document
    b'{"query": "a", "document": ""}',
    b'{"query": "  ", "document": "b"}',
    b'{"query": null, "document": "b"}',
    b'{"query": 7, "document": "b"}',
    b'{"query": "a\\ud800", "document": "b"}',  # half a surrogate pair
]


def source(path, limit=0.5):
    return SourceConfig(name="web", path=str(path), bad_records="skip", bad_records_limit=limit)


def good(count, start=0):
    return [(f"query {n}", f"document {n}") for n in range(start, start + count)]


def line(pair):
    return json.dumps(dict(zip(("query", "document"), pair, strict=True))).encode()


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_named_and_left_out(tmp_path, bad, caplog):
    path = tmp_path / "a.jsonl"
    pairs = good(4)
    path.write_bytes(b"\n".join([*map(line, pairs[:2]), bad, *map(line, pairs[2:])]))
    config = source(path)
    records = BadRecords(config)
    with caplog.at_level(logging.WARNING):
        assert list(adapters.read_pairs(config, records)) == pairs
    assert records.left_out == 1
    assert "left out: source 'web'" in caplog.text and "line 3" in caplog.text
    assert "source web: 1 of 5 records left out" in caplog.text
    # The same record stops a source that allows none.
    with pytest.raises(DataError, match=r"a\.jsonl, line 3"):
        list(adapters.read_pairs(config.model_copy(update={"bad_records": "error"})))


def test_bad_rows_of_parquet_are_left_out(tmp_path):
    queries = [b"a", b"b\xff", b"c", None, b"e", b""]
    made = pa.array(queries, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(made), made.buffers(), made.null_count)
    table = pa.table({"query": text, "document": [f"d{n}" for n in range(6)]})
    parquet.write_table(table, tmp_path / "a.parquet")
    config = source(tmp_path / "a.parquet")
    records = BadRecords(config)
    assert list(adapters.read_pairs(config, records)) == [("a", "d0"), ("c", "d2"), ("e", "d4")]
    assert records.left_out == 3


def test_more_than_the_limit_is_an_error_at_the_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*map(line, good(97)), *BAD_LINES[:3]]))
    assert len(list(adapters.read_pairs(source(path, 0.03)))) == 97
    with pytest.raises(DataError, match=r"'web': 3 of the first 100 records .* = 0\.02"):
        list(adapters.read_pairs(source(path, 0.02)))


def test_a_file_of_another_kind_is_given_up_early(tmp_path):
    """A million wrong lines need not all be read to know."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"question": "a", "document": "b"}\n' * 5000)
    with pytest.raises(DataError, match=r"11 of the first 11 .* line 11: no column 'query'"):
        list(adapters.read_pairs(source(path, 0.01)))


def test_a_file_that_breaks_off_is_an_error_all_the_same(tmp_path):
    """What comes after cannot be counted."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(map(line, good(400))))[:-20])
    with pytest.raises(DataError, match="break off or are damaged after line"):
        list(adapters.read_pairs(source(path)))
