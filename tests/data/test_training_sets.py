"""Public training sets in the layouts they are published in: read into the same lists."""

import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from arcticjax.errors import DataError
from tests.data import candidate_files
from tests.data.known_lists import DOCUMENTS, EXPECTED, QUERIES, texts


def beir(folder):
    corpus = [
        {"_id": f"d{n}", "title": text.split()[0], "text": text.split()[1]}
        for n, text in enumerate(DOCUMENTS)
    ]
    folder.mkdir()
    with gzip.open(folder / "corpus.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(one) + "\n" for one in corpus)
    queries = [{"_id": f"q{n}", "text": text} for n, text in enumerate(QUERIES)]
    candidate_files.jsonl(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir()
    (folder / "qrels" / "train.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq0\td0\t1\nq0\td2\t0\nq1\td1\t1\nq1\td3\t2\n"
    )
    return folder


def test_a_beir_folder_without_candidates(tmp_path, opened, tokenizer):
    found = opened(path=f"beir:{beir(tmp_path / 'beir')}?split=train")
    assert texts(found, tokenizer) == {query: (EXPECTED[query][0], []) for query in QUERIES[:2]}


def test_ids_of_a_beir_folder_may_be_whole_numbers(tmp_path, opened, tokenizer):
    """As in mining and evaluation."""
    candidate_files.jsonl(tmp_path / "queries.jsonl", [{"_id": 7, "text": QUERIES[0]}])
    candidate_files.jsonl(tmp_path / "corpus.jsonl", [{"_id": 8, "text": DOCUMENTS[0]}])
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n7\t8\t1\n\n")
    assert texts(opened(path=f"beir:{tmp_path}"), tokenizer) == {QUERIES[0]: ([DOCUMENTS[0]], [])}


@pytest.mark.parametrize("form", ["ids", "jsonl"])
def test_an_msmarco_folder(tmp_path, opened, tokenizer, form):
    negatives = msmarco(tmp_path)[form]
    found = opened(path=f"msmarco:{tmp_path}?negatives={negatives}")
    assert texts(found, tokenizer) == EXPECTED


def msmarco(folder):
    """Writes the files of such a folder; names of those with negatives, in both forms."""
    lines = {
        "collection.tsv": [f"{n}\t{text}" for n, text in enumerate(DOCUMENTS)],
        "queries.train.tsv": [f"{n}\t{text}" for n, text in enumerate(QUERIES)],
        "qrels.train.tsv": ["0\t0\t0\t1", "1\t0\t1\t1", "1\t0\t3\t1", "2\t0\t4\t1"],
        "ids": ["0\t0\t1", "0\t0\t2", "1\t1\t4", "1\t1\t0"],
        "jsonl": [
            json.dumps({"qid": 0, "pos": [0], "neg": {"bm25": [1, 2], "other": [2]}}),
            json.dumps({"qid": 1, "pos": [1, 3], "neg": {"bm25": [4], "other": [0]}}),
        ],
    }
    names = {"ids": "triples.tsv", "jsonl": "negatives.jsonl"}
    for name, rows in lines.items():
        (folder / names.get(name, name)).write_text("".join(f"{row}\n" for row in rows))
    return names


@pytest.fixture
def arctic_batch(tokenizer):
    """Writes a batch as ArcticTraining does: token lists with special tokens and prompts, of the
    EXPECTED lists."""

    def write(folder, query_prompt="", document_prompt=""):
        def ids(text, prompt):
            both = (tokenizer.encode([one])[0].tolist() for one in (prompt, text) if one)
            return [tokenizer.start_id, *(token for one in both for token in one), tokenizer.end_id]

        whole = pa.uint64()
        tables = {
            "queries": {
                "BATCH_QUERY_ID": pa.array([5, 6], whole),
                "QUERY_TOKEN_ID_LIST": [ids(text, query_prompt) for text in QUERIES[:2]],
            },
            "documents": {
                "BATCH_DOCUMENT_ID": pa.array(range(5), whole),
                "DOCUMENT_TOKEN_ID_LIST": [ids(text, document_prompt) for text in DOCUMENTS],
            },
            "relations": {
                "BATCH_QUERY_ID": pa.array([5, 5, 5, 6, 6, 6, 6, 6], whole),
                "BATCH_DOCUMENT_ID": pa.array([0, 1, 2, 1, 3, 4, 0, 2], whole),
                "RELEVANCE": pa.array([1, -1, -1, 1, 1, -1, -1, 0], pa.int8()),
            },
        }
        folder.mkdir(parents=True)
        for name, columns in tables.items():
            parquet.write_table(pa.table(columns), folder / f"{name}.parquet")

    return write


def prefixes(folder, query="", document=""):
    """The metadata.json that stands beside the batches of a stage."""
    facts = {"query_prefix": query, "document_prefix": document, "max_length": 512}
    (folder / "metadata.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("given", ["stage", "stage/data", "stage/data/batch_00000000"])
def test_batches_of_arctictraining(tmp_path, opened, tokenizer, arctic_batch, given):
    """The prompts that metadata.json beside `data` names are taken off, wherever the path points;
    other prompts are other lists."""
    arctic_batch(tmp_path / "stage" / "data" / "batch_00000000", "river", "violin")
    prefixes(tmp_path / "stage", "river", "violin")
    found = opened(path=f"arctictraining:{tmp_path / given}")
    assert texts(found, tokenizer) == EXPECTED

    prefixes(tmp_path / "stage", "river", "harbour")
    with pytest.raises(DataError, match="document 0 does not begin with the prompt in metadata"):
        opened(path=f"arctictraining:{tmp_path / given}")


def test_stages_of_arctictraining_have_their_own_prompts(tmp_path, opened, tokenizer, arctic_batch):
    for name, prompt in (("first", "river"), ("second", "ember"), ("third", "")):
        arctic_batch(tmp_path / name / "data" / "batch_00000000", prompt)
        prefixes(tmp_path / name, prompt)
    # The nearest counts.
    (tmp_path / "third" / "metadata.json").rename(tmp_path / "third" / "data" / "metadata.json")
    prefixes(tmp_path / "third", "falcon")
    found = opened(path=f"arctictraining:{tmp_path}")
    assert texts(found, tokenizer) == EXPECTED


def test_a_batch_of_arctictraining_without_metadata(tmp_path, opened, arctic_batch):
    batch = tmp_path / "far" / "stage" / "data" / "batch_00000000"
    arctic_batch(batch)
    prefixes(tmp_path / "far")
    with pytest.raises(DataError, match=r"batch_00000000: no metadata\.json here or up to two .*"
                                        r"query_prefix"):  # fmt: skip
        opened(path=f"arctictraining:{tmp_path}")


def skipped(opened, problem, records, **fields):
    """The lists of a source of so many records without its one bad one, which stops a source that
    allows none, or fewer."""
    with pytest.raises(DataError, match=problem):
        opened(**fields)
    share = 1 / records
    fields["bad_records"] = "skip"
    with pytest.raises(DataError, match=rf"1 of the first {records} records are not whole"):
        opened(**fields, bad_records_limit=share * 0.99)
    found = opened(**fields, bad_records_limit=share * 1.01)
    assert found.manifest["left_out"] == 1
    return found


@pytest.mark.parametrize(
    ("name", "line", "problem"),
    [
        ("corpus.jsonl.gz", b'{"_id": "x", "te', "jsonl.gz, line 6: not valid JSON"),
        ("corpus.jsonl.gz", b'{"_id": "x"}', "jsonl.gz, line 6: needs _id and text"),
        ("corpus.jsonl.gz", b'{"_id": "x", "text": "\\ud800"}', "line 6: a text is not valid Unic"),
        ("queries.jsonl", b'{"_id": "x", "text": "\xff"}', "jsonl, line 4: not valid UTF-8"),
        ("queries.jsonl", b'{"_id": null, "text": "river"}', "line 4: needs _id and text"),
        ("qrels/train.tsv", b"q0\td0", "train.tsv, line 6: no grade in column 3"),
        ("qrels/train.tsv", b"q\xff\td0\t1", "train.tsv, line 6: not valid UTF-8"),
        (
            "qrels/train.tsv",
            b"q0\tx\t1",
            "query 'q0' names document 'x', which is not in the corpus",
        ),
        (
            "qrels/train.tsv",
            b"x\td0\t1",
            "query 'x', which has a positive, is not among the queries",
        ),
    ],
)
def test_a_bad_record_of_a_beir_folder(tmp_path, opened, tokenizer, name, line, problem):
    """Twelve whole ones stand before it."""
    folder = beir(tmp_path / "beir")
    opener = gzip.open if name.endswith(".gz") else open
    with opener(folder / name, "ab") as file:
        file.write(line + b"\n")
    found = skipped(opened, problem, 13, path=f"beir:{folder}?split=train")
    assert texts(found, tokenizer) == {query: (EXPECTED[query][0], []) for query in QUERIES[:2]}


def test_an_empty_query_with_a_positive_is_bad(tmp_path, opened, tokenizer):
    folder = beir(tmp_path / "beir")
    with open(folder / "queries.jsonl", "a") as file:
        file.write('{"_id": "q4", "text": " "}\n{"_id": "q5", "text": ""}\n')
    with open(folder / "qrels" / "train.tsv", "a") as file:
        file.write("q4\td0\t1\n")
    fields = {"path": f"beir:{folder}?split=train"}
    found = skipped(opened, "query 'q4', which has a positive, is empty", 15, **fields)
    assert list(texts(found, tokenizer)) == QUERIES[:2]


@pytest.mark.parametrize(
    ("name", "line", "problem"),
    [
        (
            "collection.tsv",
            "9\ta\tb",
            r"collection.tsv, line 6: 3 fields, expected an id and a text",
        ),
        ("queries.train.tsv", "9", r"queries.train.tsv, line 4: 1 fields"),
        ("triples.tsv", "0\t1", r"triples.tsv, line 5: 2 fields, expected ids of query"),
        ("triples.tsv", "0\t0\t9", "query '0' names document '9', which is not in the corpus"),
    ],
)
def test_a_bad_record_of_an_msmarco_folder(tmp_path, opened, tokenizer, name, line, problem):
    msmarco(tmp_path)
    with open(tmp_path / name, "a") as file:
        file.write(f"{line}\n")
    found = skipped(opened, problem, 17, path=f"msmarco:{tmp_path}?negatives=triples.tsv")
    assert texts(found, tokenizer) == EXPECTED


def test_a_bad_line_of_msmarco_negatives(tmp_path, opened, tokenizer):
    names = msmarco(tmp_path)
    with open(tmp_path / names["jsonl"], "a") as file:
        file.write('{"qid": 1, "neg": 7}\n')
    path = f"msmarco:{tmp_path}?negatives={names['jsonl']}"
    found = skipped(opened, "negatives.jsonl, line 3: needs qid and neg", 17, path=path)
    assert texts(found, tokenizer) == EXPECTED


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("queries", (7, None), "query 7 is empty or not of this tokenizer"),
        ("queries", (7, [99999]), "query 7 does not begin with the prompt"),
        ("documents", (7, []), "document 7 is empty or not of this tokenizer"),
        ("relations", (5, 7, 1), "row 9: names document 7, which the batch does not hold"),
        ("relations", (7, 0, 1), "row 9: names query 7, which the batch does not hold"),
        ("relations", (5, 0, None), "row 9: the relevance None is not a number"),
    ],
)
def test_a_bad_record_of_arctictraining(
    tmp_path, opened, tokenizer, arctic_batch, name, row, problem
):
    batch = tmp_path / "batch"
    arctic_batch(batch, "" if row[1] is None else "river", "violin")
    prefixes(tmp_path, "" if row[1] is None else "river", "violin")
    table = parquet.read_table(batch / f"{name}.parquet")
    columns = zip(table.schema, row, strict=True)
    more = pa.table([pa.array([value], field.type) for field, value in columns], table.schema)
    parquet.write_table(pa.concat_tables([table, more]), batch / f"{name}.parquet")
    found = skipped(opened, problem, 16, path=f"arctictraining:{tmp_path}")
    assert texts(found, tokenizer) == EXPECTED


def test_a_query_of_arctictraining_whose_relations_are_all_left_out(
    tmp_path, opened, tokenizer, arctic_batch
):
    """It has no positive, and the queries around it keep their lists."""
    arctic_batch(tmp_path / "batch")
    prefixes(tmp_path)
    file = tmp_path / "batch" / "relations.parquet"
    table = parquet.read_table(file)
    columns = table.to_pydict()
    columns["BATCH_DOCUMENT_ID"] = [
        99 if query == 5 else document
        for query, document in zip(
            columns["BATCH_QUERY_ID"], columns["BATCH_DOCUMENT_ID"], strict=True
        )
    ]
    parquet.write_table(pa.table(columns, table.schema), file)
    path = f"arctictraining:{tmp_path}"
    with pytest.raises(DataError, match="row 1: names document 99"):
        opened(path=path)
    found = opened(path=path, bad_records="skip", bad_records_limit=0.5)
    assert found.manifest["left_out"] == 3
    wanted = {**EXPECTED, QUERIES[0]: ([], [])}
    kept = texts(found, tokenizer)
    assert {query: lists for query, lists in kept.items() if lists[0]} == {
        query: lists for query, lists in wanted.items() if lists[0]
    }


def test_missing_negatives_of_a_line_are_counted_one_by_one(tmp_path, opened):
    names = msmarco(tmp_path)
    with open(tmp_path / names["jsonl"], "a") as file:
        file.write(json.dumps({"qid": 0, "neg": list(range(100, 110))}) + "\n")
    path = f"msmarco:{tmp_path}?negatives={names['jsonl']}"
    with pytest.raises(DataError, match="10 of the first 26 records are not whole"):
        opened(path=path, bad_records="skip", bad_records_limit=0.3)
    found = opened(path=path, bad_records="skip", bad_records_limit=0.4)
    assert found.manifest["left_out"] == 10


def test_judgements_of_no_known_query(tmp_path, opened):
    folder = beir(tmp_path / "beir")
    lines = "query-id\tcorpus-id\tscore\nq9\td0\t1\n"
    (folder / "qrels" / "train.tsv").write_text(lines)
    with pytest.raises(DataError, match="no query with a positive has text"):
        opened(path=f"beir:{folder}?split=train", bad_records="skip", bad_records_limit=0.5)


def test_a_torn_batch_of_arctictraining_is_an_error_all_the_same(tmp_path, opened, arctic_batch):
    arctic_batch(tmp_path / "batch")
    prefixes(tmp_path)
    file = tmp_path / "batch" / "documents.parquet"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match="no whole batch of queries, documents and relations"):
        opened(path=f"arctictraining:{tmp_path}", bad_records="skip")
