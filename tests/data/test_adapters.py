"""Reading pairs: every accepted form, and a clear message for every fault of a file."""

import gzip
import json
import sys
import types
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from arcticjax.config.schema import SourceConfig
from arcticjax.data import adapters, record_format
from arcticjax.errors import DataError

PAIRS = [("what is snow", "frozen water"), ("été", "雪とは"), ("a\nb", "x" * 5000)]


def source(path, **columns) -> SourceConfig:
    return SourceConfig(name="web", path=str(path), **columns)


def read(path, **columns):
    return list(adapters.read_pairs(source(path, **columns)))


def fails(path, words, **columns):
    with pytest.raises(DataError, match=words) as caught:
        read(path, **columns)
    assert str(caught.value).startswith("source 'web', ")
    assert "\n" not in str(caught.value)


def write_parquet(path, queries, documents, kind=None, **options):
    table = pa.table({"query": pa.array(queries, kind), "document": pa.array(documents, kind)})
    parquet.write_table(table, path, **options)
    return path


def write_jsonl(path: Path, records, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def records(pairs=PAIRS):
    return [{"query": query, "document": document, "extra": 1} for query, document in pairs]


@pytest.fixture
def good(tmp_path):
    return write_jsonl(tmp_path / "good.jsonl", records())


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet(tmp_path, kind):
    path = write_parquet(tmp_path / "a.parquet", *zip(*PAIRS, strict=True), kind)
    assert read(path) == PAIRS
    assert read(path, query="document", document="query") == [(b, a) for a, b in PAIRS]


def test_parquet_in_many_batches_and_row_groups(tmp_path):
    pairs = [(f"q{number}", f"d{number}") for number in range(5000)]
    path = write_parquet(tmp_path / "a.parquet", *zip(*pairs, strict=True), row_group_size=1700)
    assert read(path) == pairs


def test_jsonl_plain_and_gzipped(tmp_path, good):
    assert read(good) == PAIRS
    assert read(write_jsonl(tmp_path / "a.jsonl.gz", records(), gzip.open)) == PAIRS


def test_endings_may_be_in_capitals(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    packed = write_jsonl(folder / "A.JSONL.GZ", records(), gzip.open)
    table = write_parquet(tmp_path / "a.PARQUET", *zip(*PAIRS, strict=True))
    assert read(packed) == read(folder) == read(table) == PAIRS


def test_other_addresses_are_refused_as_such():
    fails("gs://bucket/a.parquet", "a.parquet: gs:// addresses are not supported in this version")


def test_jsonl_tolerates_byte_order_mark_blank_lines_and_no_last_newline(tmp_path):
    text = '﻿{"query": "a", "document": "b"}\r\n\r\n{"query": "c", "document": "d"}'
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    assert read(tmp_path / "a.jsonl") == [("a", "b"), ("c", "d")]


def test_folder_is_read_in_order_of_names(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / ".cache").mkdir()
    for number, name in enumerate(["b.parquet", "a.parquet", "sub/c.parquet", ".cache/x.parquet"]):
        write_parquet(folder / name, [f"q{number}"], [f"d{number}"])
    (folder / "_SUCCESS").touch()
    assert [query for query, _ in read(folder)] == ["q1", "q0", "q2"]
    assert read(str(folder) + "/") == read(folder)


def test_reading_is_lazy(good):
    with good.open("a") as file:
        file.write("not json\n")
    pairs = adapters.read_pairs(source(good))
    assert [next(pairs) for _ in PAIRS] == PAIRS
    with pytest.raises(DataError):
        next(pairs)


def test_missing_file_proposes_a_near_one(tmp_path, good):
    fails(tmp_path / "goood.jsonl", r"no such file or folder; did you mean .*good\.jsonl\?")
    fails(tmp_path / "none" / "x.jsonl", "no such file or folder .nor its folder")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    fails(tmp_path / name, rf"{name}: the file is empty")


def test_no_records(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n \n")
    fails(tmp_path / "a.jsonl", "holds no records")
    fails(write_parquet(tmp_path / "a.parquet", [], [], pa.string()), "holds no records")


def test_unknown_or_mixed_kinds(tmp_path, good):
    (tmp_path / "a.csv").write_text("query,document\n")
    fails(tmp_path / "a.csv", r"unknown kind of file; expected \.parquet, \.jsonl")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", r"the folder holds no \.parquet")
    write_parquet(tmp_path / "a.parquet", ["a"], ["b"])
    fails(tmp_path, "both Parquet and JSONL")


def test_missing_column_proposes_the_nearest(tmp_path, good):
    path = write_parquet(tmp_path / "a.parquet", ["a"], ["b"])
    fails(
        path,
        r"a\.parquet: no column 'documnt' for the document; it has query, document: did you mean "
        "'document'",
        document="documnt",
    )
    fails(path, "no column 'zzz' for the query; .*set data.sources query", query="zzz")
    fails(good, r"good\.jsonl, line 1: no column 'qury' .* mean 'query'", query="qury")
    path = write_jsonl(tmp_path / "b.jsonl", [*records(), {"query": "a", "Document": "b"}])
    fails(path, r"b\.jsonl, line 4: no column 'document' .* mean 'Document'")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, r"is missing \(null\)"),
        ("", "is empty"),
        (" \t\n\u3000", "is empty"),
    ],
)
@pytest.mark.parametrize("side", ["query", "document"])
def test_null_empty_and_blank_text(tmp_path, value, words, side):
    pairs = [*PAIRS, (value, "b") if side == "query" else ("a", value)]
    jsonl = write_jsonl(tmp_path / "a.jsonl", records(pairs))
    fails(jsonl, rf"a\.jsonl, line 4: column '{side}' {words}")
    table = write_parquet(tmp_path / "a.parquet", *zip(*pairs, strict=True))
    fails(table, rf"a\.parquet, row 4: column '{side}' {words}")


def test_row_numbers_run_through_batches(tmp_path):
    queries = ["a"] * 3000
    queries[2500] = ""
    path = write_parquet(tmp_path / "a.parquet", queries, ["b"] * 3000, row_group_size=900)
    fails(path, "row 2501: column 'query' is empty")


@pytest.mark.parametrize("value", [7, 1.5, True, ["a"], {"text": "a"}])
def test_text_of_another_type(tmp_path, value):
    path = write_jsonl(tmp_path / "a.jsonl", [*records(), {"query": value, "document": "b"}])
    fails(path, rf"line 4: column 'query' is not text but {type(value).__name__}")
    path = write_parquet(tmp_path / "a.parquet", [value], ["b"])
    fails(path, r"column 'query' holds .*, not text; name a text column")


def test_all_null_column(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [None, None], ["b", "c"])
    fails(path, "row 1: column 'query' is missing")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"query": "a", "docu', "not valid JSON"),
        (b"what is snow", "not valid JSON"),
        (b'["a", "b"]', "holds list, expected an object"),
        (b"null", "holds NoneType"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"query": "a\xff", "document": "b"}', "not valid UTF-8"),
        (b'{"query": "\\ud800", "document": "b"}', "column 'query' is not valid Unicode"),
        ("query".encode("utf-16"), "not valid UTF-8"),
    ],
)
def test_bad_lines_are_numbered(good, line, words):
    with good.open("ab") as file:
        file.write(b"\n" + line + b"\n")
    fails(good, rf"good\.jsonl, line 5: {words}")


def test_a_line_without_end(good, monkeypatch):
    monkeypatch.setattr(adapters, "_LONGEST_LINE", 1 << 20)
    with good.open("a") as file:
        file.write("x" * (1 << 21))
    fails(good, "line 4: longer than 1 MiB")


def test_bad_utf8_in_parquet(tmp_path):
    values = pa.array([b"fine", b"bad \xff\xfe", b"fine"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, values.buffers())
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"query": text, "document": ["a", "b", "c"]}), path)
    fails(path, r"a\.parquet, row 2: column 'query' is not valid UTF-8")


def test_corrupt_parquet(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet", [f"q{n} {n**7}" for n in range(20_000)], ["d"] * 20_000
    )
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    fails(path, r"a\.parquet: cannot be read as Parquet")
    path.write_bytes(b"PAR0" * 10)
    fails(path, "cannot be read as Parquet")
    place = len(content) // 3
    path.write_bytes(content[:place] + bytes(4096) + content[place + 4096 :])
    fails(path, "cannot be read as Parquet after row|is not valid UTF-8|is empty")


def test_truncated_or_damaged_gzip(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl.gz", records([(f"q{n**9}", "d") for n in range(2000)]), gzip.open
    )
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    fails(path, r"a\.jsonl\.gz: the gzip data break off or are damaged after line \d+")
    path.write_bytes(b"plain text")
    fails(path, "gzip data break off or are damaged after line 0")
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
    fails(path, "are damaged after line|not valid JSON|not valid UTF-8")


def test_identity_follows_files_and_columns(tmp_path, good):
    first = adapters.identity(source(good))
    assert json.loads(json.dumps(first)) == first
    assert adapters.identity(source(good)) == first
    assert adapters.identity(source(good, query="extra")) != first
    with good.open("a") as file:
        file.write("\n")
    assert adapters.identity(source(good)) != first
    assert adapters.identity(source("hub:a/b")) == {
        "path": "hub:a/b",
        "query": "query",
        "document": "document",
    }


def test_hub_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails("hub:owner/name", "needs the datasets library .*pip install datasets, or save the pairs")


def test_hub(monkeypatch):
    asked = []

    def load_dataset(name, config, **options):
        asked.append((name, config, options))
        if name == "owner/none":
            raise FileNotFoundError("no\nsuch dataset")
        return iter([*records(), {"query": None, "document": "b"}])

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    pairs = adapters.read_pairs(source("hub:owner/name?config=pair&split=dev&revision=abc"))
    assert [next(pairs) for _ in PAIRS] == PAIRS
    options = {"split": "dev", "revision": "abc", "streaming": True}
    assert asked == [("owner/name", "pair", options)]
    with pytest.raises(DataError, match=r"record 4: column 'query' is missing"):
        next(pairs)
    fails("hub:owner/none", "datasets library could not read it .no such dataset")
    fails("hub:owner/name?spilt=dev", "unknown option 'spilt'; known: config, revision, split")
    fails("hub:", "no name after 'hub:'")
    fails("hub:owner/name", "record 1: no column 'text'", query="text")


@pytest.mark.filterwarnings("ignore:label:DeprecationWarning")  # TFDS and protobuf
def test_tfds(tmp_path):
    from array_record.python import array_record_module

    folder = tmp_path / "set" / "1.0.0"
    folder.mkdir(parents=True)
    names = {"query": "query_tokens", "document": "document_tokens"}
    values = [(query.encode(), document.encode()) for query, document in PAIRS]
    writer = array_record_module.ArrayRecordWriter(
        str(folder / record_format.shard_name(0, 1)), "group_size:1"
    )
    for value in values:
        writer.write(record_format.serialize(*value))
    writer.close()
    for file, text in record_format.tfds_metadata("x", [len(PAIRS)], 1).items():
        (folder / file).write_text(text)
    assert read(f"tfds:{folder}", **names) == PAIRS
    fails(f"tfds:{folder}?split=dev", "TFDS could not read it", **names)
    fails(f"tfds:{folder}", "record 1: no column 'query'")
    fails(f"tfds:no_such_set?data_dir={tmp_path}", "TFDS could not read it")


def test_nothing_heavy_is_imported():
    import subprocess

    code = (
        "import sys, arcticjax.data.adapters, arcticjax.data.catalog\n"
        "heavy = {'torch', 'tensorflow', 'datasets', 'tensorflow_datasets', 'jax'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
