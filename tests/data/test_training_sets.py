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


@pytest.mark.parametrize("form", ["ids", "jsonl"])
def test_an_msmarco_folder(tmp_path, opened, tokenizer, form):
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
        (tmp_path / names.get(name, name)).write_text("".join(f"{row}\n" for row in rows))
    found = opened(path=f"msmarco:{tmp_path}?negatives={names[form]}")
    assert texts(found, tokenizer) == EXPECTED


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
