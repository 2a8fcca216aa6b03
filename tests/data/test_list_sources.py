"""Sources of hard negatives: every layout is read into the same lists, and cut when drawn."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from arcticjax.config.negatives import NegativesConfig
from arcticjax.config.schema import SourceConfig
from arcticjax.data import catalog, list_sources, lists
from arcticjax.data.list_views import ListView
from arcticjax.data.policy import Policy
from arcticjax.data.stored import text_id
from arcticjax.errors import DataError
from arcticjax.models.tokenizer import TextTokenizer
from tests import tiny
from tests.data import candidate_files

QUERIES = ["river stone", "cloud ember", "violin harbour"]
DOCUMENTS = ["meadow copper", "thistle falcon", "glacier orchard", "pepper quartz", "saddle timber"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TextTokenizer.from_file(tiny.tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def opened(tmp_path, tokenizer):
    """Fields of a source -> its lists, and the text behind every token."""

    def one(others=(), **fields):
        return list_sources.open_source(
            SourceConfig(name="one", **fields),
            tmp_path / "cache",
            tokenizer,
            lambda source: catalog.open_cached(source, tmp_path / "cache", tokenizer),
            others,
        )

    return one


def texts(found, tokenizer):
    """{query: (its positives, its candidates)} as texts."""
    words = {tokenizer.encode([word])[0][0]: word for word in tiny.WORDS}

    def text(tokens):
        return " ".join(words[token] for token in tokens.tolist())

    documents = [text(one) for one in found.documents(np.arange(len(found.document_ids)))]
    rows = found.lists(np.arange(len(found)))
    return {
        text(query): (
            [documents[one] for one in positives if one >= 0],
            [documents[one] for one in ids if one >= 0],
        )
        for query, positives, ids in zip(
            found.queries(np.arange(len(found))), rows.positives_QP, rows.ids_QK, strict=True
        )
    }


EXPECTED = {
    QUERIES[0]: ([DOCUMENTS[0]], [DOCUMENTS[1], DOCUMENTS[2]]),
    QUERIES[1]: ([DOCUMENTS[1], DOCUMENTS[3]], [DOCUMENTS[4], DOCUMENTS[0]]),
}


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


def policy(positives=1, seed=0, **fields):
    return Policy.from_config(NegativesConfig(**fields), positives, seed)


@pytest.fixture
def scored(tmp_path, opened):
    """Lists of 48 queries with scores from 0.2 to 0.9."""
    file = candidate_files.jsonl(tmp_path / "a.jsonl", candidate_files.records(0, 48))
    return opened(
        path=str(file), document="pos", negatives=["neg"], scores=["pos_scores", "neg_scores"]
    )


def upper(value, kind="absolute"):
    return {"upper": {"kind": kind, "value": value}}


def test_a_view_holds_the_queries_that_have_enough(scored):
    strict = ListView("one", [scored], policy(count=3, thresholds=upper(0.6)))
    loose = ListView("one", [scored], policy(count=3, thresholds=upper(0.85)))
    assert 0 < len(strict) < len(loose) <= 48
    selected = strict.select(np.arange(len(strict)), 0, 0.0)
    assert (selected.documents_BC >= 0).all()
    assert selected.scores_BC[:, 1:].max() <= 0.6
    assert strict.yields[0].kept == len(strict)


def test_uses_of_a_query_have_other_negatives(scored):
    view = ListView("one", [scored], policy(count=2, uses=2))
    half = len(view) // 2
    first, second = (view.select(np.arange(start, start + half), 0, 0.0) for start in (0, half))
    assert np.array_equal(first.query_ids_B, second.query_ids_B)
    for one, two in zip(first.documents_BC[:, 1:], second.documents_BC[:, 1:], strict=True):
        assert not set(one.tolist()) & set(two.tolist())


def test_a_curriculum_cuts_by_the_share_of_the_run(scored):
    curriculum = {"points": [{"start": 0.0, "upper": 0.5}, {"start": 0.5, "upper": 0.9}]}
    fields = {"count": 1, "thresholds": upper(0.9), "curriculum": curriculum}
    view = ListView("one", [scored], policy(**fields))
    hardest = [
        view.select(np.arange(len(view)), 0, progress).scores_BC[:, 1].max()
        for progress in (0.0, 0.49, 0.5, 0.99)
    ]
    assert hardest[0] == hardest[1] <= 0.5 < hardest[2] == hardest[3] <= 0.9
    assert len(view.yields) == 2 and view.yields[0].kept < view.yields[1].kept

    fields["curriculum"] = {**curriculum, "shape": "linear", "levels": 4}
    found = policy(**fields)
    limits = [found.cut_at(progress).upper for progress in (0, 0.124, 0.125, 0.375, 0.5, 1)]
    values = [limit.value for limit in limits if limit is not None]
    np.testing.assert_allclose(values, [0.5, 0.5, 0.6, 0.8, 0.9, 0.9])


def test_random_negatives_change_by_epoch_and_seed_alone(scored):
    view = ListView("one", [scored], policy(count=2, sampling="random"))
    first = view.select(np.arange(8), 0, 0.0).documents_BC
    assert np.array_equal(view.select(np.arange(4, 8), 0, 0.9).documents_BC, first[4:])
    assert not np.array_equal(view.select(np.arange(8), 1, 0.0).documents_BC, first)
    other = ListView("one", [scored], policy(count=2, sampling="random", seed=1))
    assert not np.array_equal(other.select(np.arange(8), 0, 0.0).documents_BC, first)


def test_merged_views_are_the_views_in_turn(scored):
    one = ListView("one", [scored], policy(count=2))
    both = ListView.merged("both", [one, one], None)
    assert len(both) == 2 * len(one)
    records = np.array([3, len(one) + 5, 1])
    together = both.select(records, 0, 0.0)
    alone = one.select(np.array([3, 5, 1]), 0, 0.0)
    assert np.array_equal(together.query_ids_B, alone.query_ids_B)
    for name in ("documents_BC", "known_BP"):
        mine, other = getattr(together, name), getattr(alone, name)
        ids = [
            view.document_ids(np.maximum(some, 0)) for view, some in ((both, mine), (one, other))
        ]
        assert np.array_equal(np.where(mine >= 0, ids[0], 0), np.where(other >= 0, ids[1], 0))
    tokens = zip(both.query_tokens(records), one.query_tokens(np.array([3, 5, 1])), strict=True)
    assert all(np.array_equal(a, b) for a, b in tokens)
    documents = together.documents_BC[:, 0]
    pairs = zip(
        both.document_tokens(documents), one.document_tokens(alone.documents_BC[:, 0]), strict=True
    )
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_too_few_negatives_is_an_error_with_counts(scored):
    with pytest.raises(
        DataError, match=r"no query has 3 hard.*\n.*0 of 48 queries.*48 with too few"
    ):
        ListView("one", [scored], policy(count=3, thresholds=upper(0.1)))


def test_thresholds_need_scores(tmp_path, opened):
    row = {"query": QUERIES[0], "pos": [DOCUMENTS[0]], "neg": [DOCUMENTS[1]]}
    file = candidate_files.jsonl(tmp_path / "a.jsonl", [row])
    found = opened(path=str(file), document="pos", negatives=["neg"])
    with pytest.raises(DataError, match="need a teacher's scores"):
        ListView("one", [found], policy(count=1, thresholds=upper(0.5)))
    with pytest.raises(DataError, match="need a teacher's scores"):
        ListView("one", [found], policy(count=1, sampling="weighted"))
    assert len(ListView("one", [found], policy(count=1))) == 1


def test_near_duplicates_of_a_positive_are_left_out(tmp_path, opened):
    words = [" ".join(tiny.WORDS[start : start + 30]) for start in (0, 1, 10)]
    row = {"query": QUERIES[0], "pos": words[:1], "neg": words[1:]}
    file = candidate_files.jsonl(tmp_path / "a.jsonl", [row])
    found = opened(path=str(file), document="pos", negatives=["neg"])
    all_of_them = ListView("one", [found], policy(count=2))
    assert all_of_them.yields[0].eligible == 2
    some = ListView("one", [found], policy(count=1, near_duplicates=0.7))
    assert some.yields[0].duplicates == 1
    assert some.select(np.array([0]), 0, 0.0).documents_BC.tolist() == [[0, 2]]
