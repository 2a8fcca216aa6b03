"""Sources of hard negatives, columns and mined candidates: read into the same lists."""

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from arcticjax.config.schema import SourceConfig
from arcticjax.data import catalog, lists
from arcticjax.data.list_views import ListView
from arcticjax.data.stored import text_id
from arcticjax.errors import DataError
from tests import tiny
from tests.data import candidate_files
from tests.data.known_lists import DOCUMENTS, EXPECTED, QUERIES, policy, texts


def test_triplets_in_parquet_columns(tmp_path, opened, tokenizer):
    """As sentence-transformers publishes them: anchor, positive, negative_1, negative_2, and scores
    in one column each."""
    table = {
        "anchor": QUERIES[:2],
        "positive": DOCUMENTS[:2],
        "negative_1": [DOCUMENTS[1], DOCUMENTS[4]],
        "negative_2": [DOCUMENTS[2], DOCUMENTS[0]],
        "score_1": [0.9, 0.9],
        "score_2": [0.5, 0.4],
        "score_3": [0.6, 0.3],
    }
    parquet.write_table(pa.table(table), tmp_path / "t.parquet")
    columns = {"query": "anchor", "document": "positive", "negatives": ["negative_1", "negative_2"]}
    found = opened(path=str(tmp_path / "t.parquet"), **columns)
    assert texts(found, tokenizer)[QUERIES[0]] == EXPECTED[QUERIES[0]]
    assert not found.scored
    scores = {"scores": ["score_1", "score_2", "score_3"]}
    found = opened(path=str(tmp_path / "t.parquet"), **columns, **scores)
    # Best first, as scores have it.
    assert texts(found, tokenizer)[QUERIES[0]][1] == [DOCUMENTS[2], DOCUMENTS[1]]
    assert found.scored
    np.testing.assert_allclose(found.lists(np.array([0])).scores_QK, [[0.6, 0.5]])


def test_lists_in_jsonl(tmp_path, opened, tokenizer):
    """As BGE publishes them."""
    rows = [
        {"query": query, "pos": positives, "neg": negatives}
        for query, (positives, negatives) in EXPECTED.items()
    ]
    file = candidate_files.jsonl(tmp_path / "bge.jsonl", rows)
    found = opened(path=str(file), document="pos", negatives=["neg"])
    assert texts(found, tokenizer) == EXPECTED
    assert found.document_ids.tolist() == [text_id(DOCUMENTS[n]) for n in (0, 1, 2, 3, 4)]


def test_passages_with_titles_in_jsonl(tmp_path, opened, tokenizer):
    """As Tevatron publishes them."""
    rows = [
        {
            "query_id": "1",
            "query": QUERIES[0],
            "positive_passages": [{"docid": "a", "title": "meadow", "text": "copper"}],
            "negative_passages": [
                {"docid": "b", "title": "", "text": DOCUMENTS[1]},
                {"docid": "c", "text": DOCUMENTS[2]},
            ],
        }
    ]
    file = candidate_files.jsonl(tmp_path / "tevatron.jsonl", rows)
    found = opened(path=str(file), document="positive_passages", negatives=["negative_passages"])
    assert texts(found, tokenizer) == {QUERIES[0]: EXPECTED[QUERIES[0]]}


def test_records_of_one_query_become_one_list(tmp_path, opened, tokenizer):
    rows = [
        {"query": QUERIES[0], "pos": [DOCUMENTS[0]], "neg": [DOCUMENTS[1], DOCUMENTS[2]]},
        {"query": QUERIES[0], "pos": [DOCUMENTS[1]], "neg": [DOCUMENTS[3]]},
    ]
    found = opened(
        path=str(candidate_files.jsonl(tmp_path / "a.jsonl", rows)),
        document="pos",
        negatives=["neg"],
    )
    assert texts(found, tokenizer) == {
        QUERIES[0]: (DOCUMENTS[:2], [DOCUMENTS[1], DOCUMENTS[2], DOCUMENTS[3]])
    }
    view = ListView("one", [found], policy(count=2))
    # The other record's positive is no negative.
    assert view.select(np.array([0]), 0, 0.0).documents_BC.tolist() == [[0, 2, 3]]


def test_pieces_of_one_document_in_columns(tmp_path, opened):
    """The second negative is of the positive's page, the third is of none."""
    row = {"query": QUERIES[0], "pos": DOCUMENTS[0], "page": 7, "neg": DOCUMENTS[1:4]}
    fields = {"document": "pos", "negatives": ["neg"], "parents": ["page", "neg_pages"]}

    def read(pages):
        file = candidate_files.jsonl(tmp_path / "a.jsonl", [{**row, "neg_pages": pages}])
        return opened(path=str(file), **fields)

    view = ListView("one", [read(["8", "7", None])], policy(count=2))
    assert view.yields[0].siblings == 1
    assert view.select(np.array([0]), 0, 0.0).documents_BC.tolist() == [[0, 1, 3]]
    # Without a parent a document is of no other's.
    alone = ListView("one", [read([None, "", None])], policy(count=3))
    assert alone.yields[0].siblings == 0

    with pytest.raises(DataError, match=r"line 1: 3 parents for 1 documents and 3 negatives"):
        read(["8", "7"])
    with pytest.raises(DataError, match=r"line 1: the parent 0\.5 is no text"):
        read(["8", 0.5, "7"])


def test_mined_candidates_of_pairs(tmp_path, opened, tokenizer):
    """Two sources mined against their union; the other one's documents are found in it."""
    pairs = {name: tiny.pairs(seed, 30) for name, seed in (("one", 0), ("two", 1))}
    sources = {}
    for name, some in pairs.items():
        queries, documents = zip(*some, strict=True)
        table = pa.table({"query": queries, "document": documents})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        sources[name] = SourceConfig(name=name, path=str(tmp_path / f"{name}.parquet"))
    folder = candidate_files.mined(tmp_path / "mined", pairs)
    fields = {"path": sources["one"].path, "candidates": str(folder)}
    found = opened(others=[sources["two"]], **fields)
    assert found.scored and len(found) == 30
    rows = found.lists(np.arange(30))
    assert (np.diff(rows.scores_QK, axis=1) <= 0).all()
    assert set(found.query_ids.tolist()) == {text_id(query) for query, _ in pairs["one"]}
    named = {text_id(document) for some in pairs.values() for _, document in some}
    assert set(found.document_ids.tolist()) <= named
    positives = dict(pairs["one"])
    by_id = {text_id(query): query for query in positives}
    for query, positive in zip(found.query_ids.tolist(), rows.positives_QP[:, 0], strict=True):
        assert found.document_ids[positive] == text_id(positives[by_id[query]])

    with pytest.raises(DataError, match=r"names \d+ documents .*one, two.* in data.sources"):
        opened(**fields)

    # The same pairs in stored form: token ids without text.
    stored_one = catalog.open_cached(sources["one"], tmp_path / "cache", tokenizer)
    again = opened(others=[sources["two"]], path=str(stored_one.directory), candidates=str(folder))
    assert again.directory != found.directory and again.fingerprint == found.fingerprint
    alone = opened(path=str(stored_one.directory))
    assert len(alone) == 30 and not alone.scored


def test_pieces_of_one_document_among_mined_candidates(tmp_path, opened, tokenizer):
    """Of two sources with pages of their own; some pages have pieces in both."""
    pairs = {name: tiny.pairs(seed, 30) for name, seed in (("one", 0), ("two", 1))}
    pages, sources = {}, {}
    for name, some in pairs.items():
        queries, documents = zip(*some, strict=True)
        titles = [f"page {n % 6}" for n in range(30)]
        pages |= {text_id(one): title for one, title in zip(documents, titles, strict=True)}
        table = pa.table({"query": queries, "document": documents, "title": titles})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        path = str(tmp_path / f"{name}.parquet")
        sources[name] = SourceConfig(name=name, path=path, parents=["title"])
    folder = str(candidate_files.mined(tmp_path / "mined", pairs))
    fields = {"path": sources["one"].path, "candidates": folder}

    def siblings(view):
        """Negatives that are of the page of their query's positive."""
        documents_BC = view.select(np.arange(len(view)), 0, 0.0).documents_BC
        found = [[pages[one] for one in row] for row in view.document_ids(documents_BC).tolist()]
        return sum(row[1:].count(row[0]) for row in found)

    def view(**more):
        found = opened(others=[sources["two"]], **fields, **more)
        return ListView("one", [found], policy(count=8))

    plain = view()
    assert siblings(plain) > 0 and plain.yields[0].siblings == 0
    without = view(parents=["title"])
    assert siblings(without) == 0 < without.yields[0].siblings
    with pytest.raises(DataError, match=r"no column 'titel' for the parents.*'title'"):
        view(parents=["titel"])

    stored_one = catalog.open_cached(sources["one"], tmp_path / "cache", tokenizer)
    fields["path"] = str(stored_one.directory)
    with pytest.raises(DataError, match=r"the stored source .* holds none"):
        view(parents=["title"])


def test_mined_candidates_of_other_data(tmp_path, opened):
    parquet.write_table(
        pa.table({"query": QUERIES[:1], "document": DOCUMENTS[:1]}), tmp_path / "a.parquet"
    )
    folder = candidate_files.mined(tmp_path / "mined", {"one": tiny.pairs(0, 30)})
    with pytest.raises(DataError, match="candidates for none of its 1 queries"):
        opened(path=str(tmp_path / "a.parquet"), candidates=str(folder))


def test_wrong_records_name_their_place(tmp_path, opened):
    def error(**changes):
        row = {"query": QUERIES[0], "pos": [DOCUMENTS[0]], "neg": [DOCUMENTS[1]], "s": [0.5, 0.1]}
        file = candidate_files.jsonl(tmp_path / "a.jsonl", [row, {**row, **changes}])
        with pytest.raises(DataError) as caught:
            opened(path=str(file), document="pos", negatives=["neg"], scores=["s"])
        return str(caught.value)

    assert "line 2: a text is empty" in error(query="")
    assert "line 2: a text is not text but int" in error(neg=[7])
    assert "line 2: 1 scores for 1 documents and 1 negatives" in error(s=[0.5])
    assert "line 2: the score 'x' is not a number" in error(s=[0.5, "x"])
    assert "line 2: column 'pos' holds no document" in error(pos=[], s=[0.5])


def test_torn_lists_are_refused(tmp_path, opened):
    row = {"query": QUERIES[0], "pos": [DOCUMENTS[0]], "neg": [DOCUMENTS[1]]}
    fields = {"path": str(candidate_files.jsonl(tmp_path / "a.jsonl", [row])), "document": "pos"}
    found = opened(**fields, negatives=["neg"])
    file = found.directory / "candidates.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"candidates\.npy has .* delete the folder"):
        lists.open_lists(found.directory)
