"""Records of columns in which something is missing: passed over, left out and counted, or an
error."""

import logging

import pyarrow as pa
import pytest
from pyarrow import parquet

from arcticjax.config.schema import SourceConfig
from arcticjax.data import list_sources
from arcticjax.errors import DataError
from tests import tiny
from tests.data import candidate_files

WORDS = ["meadow", "thistle", "glacier", "pepper"]
WHOLE = {"query": "river", "pos": ["meadow"], "neg": ["thistle"], "s": [0.9, 0.5]}
FIELDS = {"document": "pos", "negatives": ["neg"], "scores": ["s"]}


@pytest.fixture
def read(tmp_path, tokenizer):
    """Fields of a source -> its stored lists, and each query's positives and candidates as
    (text, score)."""
    words = {tokenizer.encode([word])[0][0]: word for word in tiny.WORDS}

    def one(path, **fields):
        found = list_sources.open_source(
            SourceConfig(name="one", path=str(path), **fields),
            tmp_path / "cache",
            tokenizer,
            pytest.fail,
        )
        texts = [words[int(ids[0])] for ids in found.documents(range(len(found.document_ids)))]
        rows = found.lists(range(len(found)))

        def scored(ids, scores):
            return [
                (texts[number], round(float(score), 3))
                for number, score in zip(ids, scores, strict=True)
                if number >= 0
            ]

        return found, [
            (scored(*row[:2]), scored(*row[2:]))
            for row in zip(
                rows.positives_QP,
                rows.positive_scores_QP,
                rows.ids_QK,
                rows.scores_QK,
                strict=True,
            )
        ]

    return one


@pytest.mark.parametrize(
    ("record", "positives", "negatives"),
    [
        # Of its score nothing is asked.
        ({"neg": [None, "glacier"], "s": [0.9, None, 0.4]}, ["meadow"], [("glacier", 0.4)]),
        ({"neg": ["", "glacier"], "s": [0.9, 0.6, 0.4]}, ["meadow"], [("glacier", 0.4)]),
        ({"neg": ["glacier", "  "], "s": [0.9, 0.4, 0.1]}, ["meadow"], [("glacier", 0.4)]),
        # Or it is not there either.
        ({"neg": [None, "glacier"], "s": [0.9, 0.4]}, ["meadow"], [("glacier", 0.4)]),
        ({"neg": None, "s": [0.9]}, ["meadow"], []),
        ({"neg": [], "s": [0.9, None]}, ["meadow"], []),
        ({"pos": ["", "meadow"], "s": [0.2, 0.9, 0.5]}, ["meadow"], [("thistle", 0.5)]),
        (
            {"neg": [{"title": "", "text": ""}, {"title": "", "text": "glacier"}],
             "s": [0.9, 0.6, 0.4]},
            ["meadow"],
            [("glacier", 0.4)],
        ),
    ],
)  # fmt: skip
def test_documents_without_text_are_passed_over(tmp_path, read, record, positives, negatives):
    file = candidate_files.jsonl(tmp_path / "a.jsonl", [{**WHOLE, **record}])
    _, [row] = read(file, **FIELDS)
    assert row == ([(text, 0.9) for text in positives], negatives)


def test_fewer_negatives_than_columns(tmp_path, read, caplog):
    """As in n-tuples whose last columns are null; parents go with their documents."""
    table = {
        "query": ["river", "cloud"],
        "document": ["meadow", "thistle"],
        "first": [None, "glacier"],
        "second": ["pepper", ""],
        "page": ["one", "two"],
        "first_page": [None, "two"],
        "second_page": ["one", "nothing"],
    }
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    pages = ["page", "first_page", "second_page"]
    with caplog.at_level(logging.INFO):
        found, rows = read(tmp_path / "a.parquet", negatives=["first", "second"], parents=pages)
    assert [[text for text, _ in row[1]] for row in rows] == [["pepper"], ["glacier"]]
    assert "source one: 2 null or empty documents passed over" in caplog.text
    assert found.parents_D is not None
    # Documents in the order of their numbers: meadow, pepper, thistle, glacier.
    one, first, two, second = found.parents_D.tolist()
    assert one == first != two == second != 0


BAD = [
    {"query": None},
    {"query": " "},
    {"pos": []},
    {"pos": [None, ""]},
    {"neg": [7]},
    {"s": [0.9]},
    {"s": [0.9, None]},
    {"s": [0.9, "x"]},
]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_record_is_named_and_left_out(tmp_path, read, bad, caplog):
    rows = [WHOLE, {**WHOLE, "query": "cloud", "pos": ["violin"], **bad}, WHOLE]
    file = candidate_files.jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="line 2"):
        read(file, **FIELDS)
    skipping = {**FIELDS, "bad_records": "skip", "bad_records_limit": 0.5}
    with pytest.raises(DataError, match=r"1 of the first 3 records are not whole.*0\.3"):
        read(file, **{**skipping, "bad_records_limit": 0.3})
    found, lists = read(file, **skipping)
    assert lists == [([("meadow", 0.9)], [("thistle", 0.5)])]
    # Nothing of it is kept.
    assert len(found.document_ids) == 2 and found.manifest["left_out"] == 1
    assert "line 2" in caplog.text and "source one: 1 of 3 records left out" in caplog.text


def test_lines_that_are_no_records_are_left_out(tmp_path, read):
    file = candidate_files.jsonl(tmp_path / "a.jsonl", [WHOLE, {"query": "cloud"}, WHOLE])
    file.write_text(file.read_text() + '{"query": "cl\n')
    with pytest.raises(DataError, match="line 2: no column 'pos'"):
        read(file, **FIELDS)
    found, rows = read(file, **FIELDS, bad_records="skip", bad_records_limit=0.5)
    assert len(rows) == 1 and found.manifest["left_out"] == 2


def test_rows_of_parquet_that_are_no_text_are_left_out(tmp_path, read):
    texts = pa.array([b"meadow", b"m\xff", b"glacier"], pa.binary())
    table = {
        "query": ["river", "cloud", "ember"],
        "document": pa.StringArray.from_buffers(3, *texts.buffers()[1:]),
        "neg": [["pepper"]] * 3,
    }
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2: not valid UTF-8"):
        read(tmp_path / "a.parquet", negatives=["neg"])
    found, rows = read(
        tmp_path / "a.parquet", negatives=["neg"], bad_records="skip", bad_records_limit=0.5
    )
    assert [row[0][0][0] for row in rows] == ["meadow", "glacier"]
    assert found.manifest["left_out"] == 1
