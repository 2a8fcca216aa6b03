"""BEIR folders are read strictly: good ones as they are, bad ones with file and line."""

import gzip
import json

import pytest

from arcticjax.errors import DataError
from arcticjax.scoring.beir import Task, load_task, write_task

CORPUS = [
    {"_id": "d1", "title": "Paris", "text": "A city. "},
    {"_id": "d2", "title": "", "text": "東大寺\u2028の仏像"},
    {"_id": 3, "text": "no title"},
    {"_id": "d4", "title": None, "text": ""},
]
QUERIES = [{"_id": "q1", "text": "where?"}, {"_id": "q2", "text": "unjudged"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\t3\t0\n"


def lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.fixture
def folder(tmp_path):
    """A good folder; tests break one file of it."""
    root = tmp_path / "tiny"
    root.mkdir()
    (root / "corpus.jsonl").write_text(lines(CORPUS), encoding="utf-8")
    (root / "queries.jsonl").write_text(lines(QUERIES), encoding="utf-8")
    (root / "qrels.tsv").write_text(QRELS, encoding="utf-8")
    return root


def check_tiny(task):
    assert task.name == "tiny"
    assert task.document_ids == ["d1", "d2", "3", "d4"]
    assert task.documents == ["Paris A city.", "東大寺\u2028の仏像", "no title", ""]
    assert (task.query_ids, task.queries) == (["q1", "q2"], ["where?", "unjudged"])
    assert task.qrels == {"q1": {"d1": 2, "3": 0}}


def test_reads_plain_files(folder):
    check_tiny(load_task(folder))
    check_tiny(load_task(f"{folder}/"))


def test_reads_gzip_with_byte_order_mark_windows_breaks_and_a_test_split(folder):
    for name in ("corpus.jsonl", "queries.jsonl"):
        content = (folder / name).read_bytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + content))
        (folder / name).unlink()
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_bytes(QRELS.replace("\n", "\r\n").encode() + b"\r\n")
    (folder / "qrels.tsv").unlink()
    check_tiny(load_task(folder))


def test_written_task_reads_back_equal(tmp_path, folder):
    task = load_task(folder)
    assert write_task(tmp_path / "deep" / "tiny", task) == tmp_path / "deep" / "tiny"
    assert load_task(tmp_path / "deep" / "tiny") == task
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["tiny"]


GOOD_HEAD = "query-id\tcorpus-id\tscore\n"
BAD_FILES = [
    ("corpus.jsonl", '{"_id": "a", "text": "x"}\n{"_id": "a"', r"corpus\.jsonl:2: not JSON"),
    ("corpus.jsonl", '["a"]\n', r"corpus\.jsonl:1: expected a JSON object, got list"),
    ("corpus.jsonl", '{"id": "a", "text": "x"}\n', r":1: no '_id' among the keys \['id', 'text'\]"),
    ("corpus.jsonl", '{"_id": "", "text": "x"}\n', r":1: '_id' must be a non-empty string"),
    ("corpus.jsonl", '{"_id": true, "text": "x"}\n', r":1: '_id' must be a non-empty string"),
    ("corpus.jsonl", '{"_id": "a"}\n', r":1: 'text' is missing"),
    ("corpus.jsonl", '{"_id": "a", "text": null}\n', r":1: 'text' is NoneType"),
    ("corpus.jsonl", '{"_id": "a", "text": "x", "title": 3}\n', r":1: 'title' is int"),
    ("corpus.jsonl", '{"_id": "a", "text": "\\ud800"}\n', r":1: 'text' holds half of a surrogate"),
    ("corpus.jsonl", lines(CORPUS) + lines(CORPUS[:1]), r"corpus\.jsonl:5: the _id 'd1' was used"),
    ("corpus.jsonl", "\n\n", r"corpus\.jsonl: holds no records"),
    ("corpus.jsonl", "[" * 200_000 + "\n", r"corpus\.jsonl:1: not JSON"),
    ("queries.jsonl", '{"_id": "q1", "text": " "}\n', r"queries\.jsonl:1: the query 'q1' is empty"),
    ("qrels.tsv", "q1\td1\t1\n", r"qrels\.tsv:1: the header is missing"),
    ("qrels.tsv", GOOD_HEAD, r"qrels\.tsv: holds no judgements"),
    ("qrels.tsv", GOOD_HEAD + "q1\td1\t0\n", r"qrels\.tsv: no score is above 0"),
    (
        "qrels.tsv",
        GOOD_HEAD + "q1 d1 1\n",
        r"qrels\.tsv:2: expected 3 fields parted by tabs.*got 1",
    ),
    ("qrels.tsv", GOOD_HEAD + "q1\t0\td1\t1\n", r"qrels\.tsv:2: expected 3 fields.*got 4"),
    ("qrels.tsv", GOOD_HEAD + "q1\td1\t0.5\n", r":2: the score must be an integer, got '0.5'"),
    ("qrels.tsv", GOOD_HEAD + "q9\td1\t1\n", r":2: query 'q9' is not among the queries"),
    ("qrels.tsv", GOOD_HEAD + "\nq1\td9\t1\n", r":3: document 'd9' is not in the corpus"),
    ("qrels.tsv", QRELS + "q1\td1\t1\n", r":4: query 'q1' and document 'd1' were judged.*as 2"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_content_is_refused_with_file_and_line(folder, name, content, message):
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_task(folder)


def test_a_judgement_given_twice_alike_is_accepted(folder):
    (folder / "qrels.tsv").write_text(QRELS + "q1\td1\t2\n")
    check_tiny(load_task(folder))


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels.tsv"])
def test_missing_and_ambiguous_files_are_refused(folder, name):
    other = folder / f"{name}.gz"
    other.write_bytes(gzip.compress((folder / name).read_bytes()))
    with pytest.raises(DataError, match=f"{name} and {name}.gz; keep one"):
        load_task(folder)
    other.unlink()
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"has no file {name}"):
        load_task(folder)


def test_torn_gzip_foreign_bytes_and_no_folder_are_refused(folder, tmp_path):
    (folder / "corpus.jsonl").unlink()
    packed = gzip.compress(
        lines([{"_id": f"d{i}", "text": f"t{i * i}"} for i in range(999)]).encode()
    )
    compressed = folder / "corpus.jsonl.gz"
    compressed.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"corpus\.jsonl\.gz: the gzip data breaks off after line"):
        load_task(folder)
    compressed.write_bytes(b"not gzip at all")
    with pytest.raises(
        DataError, match=r"corpus\.jsonl\.gz: the gzip data breaks off after line 0"
    ):
        load_task(folder)
    compressed.unlink()
    (folder / "corpus.jsonl").write_bytes(b'{"_id": "a", "text": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl: not UTF-8 after line 0"):
        load_task(folder)
    with pytest.raises(DataError, match="is not a folder"):
        load_task(tmp_path / "absent")


def test_writing_refuses_what_could_not_be_read_back(tmp_path):
    good = {
        "name": "t",
        "document_ids": ["d"],
        "documents": ["x"],
        "query_ids": ["q"],
        "queries": ["y"],
        "qrels": {"q": {"d": 1}},
    }
    for change, message in (
        ({"document_ids": ["d", "e"]}, "2 document ids, 1 texts"),
        ({"query_ids": ["q", "q"], "queries": ["a", "b"]}, "query ids are not unique"),
        ({"document_ids": ["d\t"]}, "is blank or has a break"),
        ({"queries": [" "]}, "query 'q' is empty"),
        ({"documents": ["\ud800"]}, "document 'd' is empty or not valid text"),
        ({"qrels": {}}, "no judgements"),
        ({"qrels": {"q": {"e": 1}}}, "unknown 'e'"),
    ):
        with pytest.raises(DataError, match=message):
            write_task(tmp_path / "t", Task(**{**good, **change}))
    assert list(tmp_path.iterdir()) == []
    write_task(tmp_path / "t", Task(**good))
    with pytest.raises(DataError, match="exists already"):
        write_task(tmp_path / "t", Task(**good))


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    task = Task("t", ["d"], ["x"], ["q"], ["y"], {"q": {"d": 1}})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("arcticjax.scoring.beir.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_task(tmp_path / "t", task)
    assert list(tmp_path.iterdir()) == []
