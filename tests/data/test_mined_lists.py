"""Lists of mined candidates that are larger than memory: read a batch at a time."""

import json
import weakref

import numpy as np
import pytest

from arcticjax.config.schema import SourceConfig
from arcticjax.data import candidates, catalog, list_sources, record_files
from arcticjax.data.stored import text_id
from arcticjax.errors import DataError
from tests import tiny
from tests.data import candidate_files

DOCUMENTS = ["meadow", "thistle", "glacier", "pepper", "saddle", "copper"]
QUERIES = ["river", "cloud", "violin", "river"]
# Numbers of documents, best first; the last query's text is that of the first.
LISTS = [([1, 2], [0]), ([2, 4, 0], [1, 3]), ([5], [4]), ([3], [2])]


@pytest.fixture
def held(monkeypatch):
    """The batches of candidates that were in memory at once, at most."""
    seen, most = [], [0]
    read = candidates.CandidateFolder.batches

    def batches(folder, group):
        for part in read(folder, group):
            seen.append(weakref.ref(part))
            most[0] = max(most[0], sum(one() is not None for one in seen))
            yield part
            del part

    monkeypatch.setattr(candidates.CandidateFolder, "batches", batches)
    return most


def own_ids(folder):
    """A BEIR folder and candidates by its ids, a query in a file."""
    task = folder / "task"
    (task / "qrels").mkdir(parents=True)
    texts = {"corpus": DOCUMENTS, "queries": QUERIES}
    for name, some in texts.items():
        rows = [{"_id": f"{name[0]}{n}", "text": text} for n, text in enumerate(some)]
        candidate_files.jsonl(task / f"{name}.jsonl", rows)
    mined = folder / "mined"
    mined.mkdir()
    names = []
    for query, sides in enumerate(LISTS):
        arrays = []
        for numbers in sides:
            scores = np.linspace(0.9, 0.1, len(numbers), dtype=np.float32)
            starts = np.array([0, len(numbers)])
            arrays += [np.array([f"c{n}" for n in numbers], object), scores, starts]
        part = candidates.Candidates(np.array([f"q{query}"], object), *arrays)
        names.append(candidates.file_name("task", query))
        candidates.write_shard(mined / names[-1], part, "own")
    group = {
        "name": "task", "sources": ["task"], "kind": "own", "queries": len(LISTS),
        "documents": len(DOCUMENTS), "sha256": "0" * 64, "files": names,
    }  # fmt: skip
    manifest = {
        "format": candidates.FORMAT, "version": candidates.FORMAT_VERSION, "top_k": 3,
        "groups": [group],
        "files": {name: record_files.file_facts(mined / name) for name in names},
    }  # fmt: skip
    (mined / candidates.MANIFEST).write_text(json.dumps(manifest))
    return SourceConfig(name="task", path=f"beir:{task}", candidates=str(mined))


def opened(source, cache, tokenizer):
    return list_sources.open_source(
        source, cache, tokenizer, lambda one: catalog.open_cached(one, cache, tokenizer)
    )


def test_own_ids_are_read_a_batch_at_a_time(tmp_path, tokenizer, held):
    found = opened(own_ids(tmp_path), tmp_path / "cache", tokenizer)
    # One that is read while the one before it is being let go.
    assert held[0] <= 2
    words = {tokenizer.encode([word])[0][0]: word for word in tiny.WORDS}
    texts = np.array([words[int(ids[0])] for ids in found.documents(np.arange(6))] + [""])
    rows = found.lists(np.arange(3))
    for query, (others, positives) in enumerate(LISTS[:3]):
        assert [one for one in texts[rows.ids_QK[query]] if one] == [DOCUMENTS[n] for n in others]
        known = texts[rows.positives_QP[query]]
        assert [one for one in known if one] == [DOCUMENTS[n] for n in positives]
    assert len(found) == 3


@pytest.mark.parametrize(("name", "number"), [("corpus", 4), ("queries", 1)])
def test_texts_that_the_folder_does_not_hold(tmp_path, tokenizer, name, number):
    source = own_ids(tmp_path)
    file = tmp_path / "task" / f"{name}.jsonl"
    rows = [line for line in file.read_text().splitlines(True) if f"{name[0]}{number}" not in line]
    file.write_text("".join(rows))
    with pytest.raises(DataError, match=rf"names 1 texts .* such as '{name[0]}{number}'"):
        opened(source, tmp_path / "cache", tokenizer)


def test_ids_of_texts_are_read_a_batch_at_a_time(tmp_path, tokenizer, held, monkeypatch):
    monkeypatch.setattr(candidates, "_ROW_GROUP", 4)
    pairs = tiny.pairs(0, 30)
    rows = [dict(zip(("query", "document"), pair, strict=True)) for pair in pairs]
    file = candidate_files.jsonl(tmp_path / "one.jsonl", rows)
    folder = candidate_files.mined(tmp_path / "mined", {"one": pairs}, depth=5)
    source = SourceConfig(name="one", path=str(file), candidates=str(folder))
    found = opened(source, tmp_path / "cache", tokenizer)
    assert held[0] <= 2
    mined = candidates.open_candidates(folder)
    lists = mined.read(mined.groups[0])
    places = {query: place for place, query in enumerate(lists.query_ids.tolist())}
    rows = found.lists(np.arange(30))
    for query, ids in zip(found.query_ids.tolist(), rows.ids_QK, strict=True):
        part = slice(*lists.candidate_starts[places[query] : places[query] + 2])
        assert found.document_ids[ids].tolist() == lists.candidate_ids[part].tolist()


def test_candidates_of_a_corpus_beside_the_pairs(tmp_path, tokenizer):
    pairs = tiny.pairs(0, 30)
    # The first ten are the source's, all documents are those they were mined among.
    rows = [dict(zip(("query", "document"), pair, strict=True)) for pair in pairs[:10]]
    file = candidate_files.jsonl(tmp_path / "one.jsonl", rows)
    corpus = [{"text": document} for _, document in pairs[5:]]
    folder = candidate_files.mined(tmp_path / "mined", {"one": pairs}, depth=20)
    source = SourceConfig(name="one", path=str(file), candidates=str(folder))
    with pytest.raises(DataError, match=r"documents of .* with their corpus, or mine again"):
        opened(source, tmp_path / "cache", tokenizer)
    path = str(candidate_files.jsonl(tmp_path / "corpus.jsonl", corpus))
    whole = source.model_copy(update={"corpus": path})
    found = opened(whole, tmp_path / "cache", tokenizer)
    ids = set(found.document_ids.tolist())
    assert len(found) == 10 and ids & {text_id(document) for _, document in pairs[10:]}
    by_id = {text_id(text): text for _, text in pairs}
    tokens = [one.tolist() for one in found.documents(np.arange(len(ids)))]
    texts = [by_id[one] for one in found.document_ids.tolist()]
    assert tokens == [one.tolist() for one in tokenizer.encode(texts)]

    # Another corpus, other lists.
    candidate_files.jsonl(tmp_path / "corpus.jsonl", corpus[:3])
    with pytest.raises(DataError, match="documents of"):
        opened(whole, tmp_path / "cache", tokenizer)
