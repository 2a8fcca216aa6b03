"""From inputs to distinct texts with ids that ascend, and which belong together."""

import hashlib
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from arcticjax.config import InputConfig, MineConfig, SourceConfig
from arcticjax.data import catalog
from arcticjax.data.stored import text_id
from arcticjax.errors import ConfigError, DataError
from arcticjax.mine import inputs
from arcticjax.models.tokenizer import TextTokenizer
from tests import tiny
from tests.mine import making

PAIRS = [
    ("river", "stone cloud"),
    ("river", "ember violin"),
    ("river", "stone cloud"),
    ("harbour", "stone cloud"),
    ("lantern", "lantern"),
]


@pytest.fixture
def tokenizer(tmp_path):
    return TextTokenizer.from_file(tiny.tokenizer_folder(tmp_path / "tokenizer"))


def pairs_file(path, pairs):
    queries, documents = zip(*pairs, strict=True)
    pyarrow.parquet.write_table(pyarrow.table({"query": queries, "document": documents}), path)
    return str(path)


def config(given, **changes):
    return MineConfig.model_validate({"teacher": "m", "input": given, "output": "out", **changes})


def texts(side):
    return side.texts(np.arange(len(side)))


def positives(pool):
    documents = texts(pool.documents)
    return {
        query: {documents[place] for place in pool.positives[start:end]}
        for query, start, end in zip(
            texts(pool.queries), pool.positive_starts, pool.positive_starts[1:], strict=False
        )
    }


def test_pairs_become_distinct_texts(tmp_path, tokenizer):
    path = pairs_file(tmp_path / "p.parquet", PAIRS)
    (pool,) = inputs.open_pools(config(path), tmp_path / "cache", tokenizer)
    assert (pool.name, pool.sources, pool.kind) == ("p", ("p",), "text")
    for side in (pool.queries, pool.documents):
        assert side.ids.tolist() == sorted(side.ids.tolist())
        assert side.ids.tolist() == [text_id(text) for text in texts(side)]
    assert positives(pool) == {
        "river": {"stone cloud", "ember violin"},
        "harbour": {"stone cloud"},
        "lantern": {"lantern"},
    }
    own = {
        query: place for query, place in zip(texts(pool.queries), pool.own_Q.tolist(), strict=True)
    }
    assert own.pop("lantern") == texts(pool.documents).index("lantern")
    assert set(own.values()) == {-1}
    tokens = pool.documents.tokens(np.array([0]))[0]
    np.testing.assert_array_equal(tokens, tokenizer.encode(texts(pool.documents))[0])


def test_a_stored_source_serves_and_one_of_another_tokenizer_does_not(tmp_path, tokenizer):
    path = pairs_file(tmp_path / "p.parquet", PAIRS)
    plain = InputConfig(name="p", path=path)
    (pool,) = inputs.open_pools(config([plain.model_dump()]), tmp_path / "cache", tokenizer)
    (directory,) = (tmp_path / "cache" / "sources").iterdir()
    stored = [{"name": "s", "path": str(directory)}]
    (again,) = inputs.open_pools(config(stored), tmp_path / "other", tokenizer)
    assert again.fingerprint == pool.fingerprint
    assert positives(again) == positives(pool)
    larger = TextTokenizer.from_file(tiny.tokenizer_folder(tmp_path / "larger", extra=1))
    with pytest.raises(DataError, match=rf"another tokenizer .* mine from {path}"):
        inputs.open_pools(config(stored), tmp_path / "other", larger)


def test_a_beir_folder_keeps_its_ids(tmp_path, tokenizer):
    folder = making.beir_folder(tmp_path / "task")
    for path in (f"beir:{folder}", str(folder)):
        (pool,) = inputs.open_pools(config(path), tmp_path / "cache", tokenizer)
        assert (pool.name, pool.kind) == ("task", "own")
    documents = dict(zip(pool.documents.ids.tolist(), texts(pool.documents), strict=True))
    assert list(documents) == sorted(documents)
    assert "d03" not in documents and len(set(documents.values())) == len(documents) == 41
    assert "q-none" not in pool.queries.ids
    places = {query: n for n, query in enumerate(pool.queries.ids.tolist())}
    ids = pool.documents.ids
    for query, wanted in {
        "q03": ["c-copy"],
        "q07": ["d07", "d08"],
        "q-twin": ["d07", "d08"],
    }.items():
        rows = slice(*pool.positive_starts[places[query] : places[query] + 2])
        assert ids[pool.positives[rows]].tolist() == wanted
    assert ids[pool.own_Q[places["q05"]]] == "x-query"


def test_the_fingerprint_of_a_beir_folder_is_of_its_content(tmp_path, tokenizer):
    """Of distinct queries, documents and which belong together, as one JSON text."""
    folder = making.beir_folder(tmp_path / "task")
    (pool,) = inputs.open_pools(config(f"beir:{folder}"), tmp_path / "cache", tokenizer)
    sides = [
        [list(pair) for pair in zip(side.ids.tolist(), texts(side), strict=True)]
        for side in (pool.queries, pool.documents)
    ]
    rows = np.split(pool.positives, pool.positive_starts[1:-1])
    content = json.dumps([*sides, [row.tolist() for row in rows]])
    assert pool.fingerprint == hashlib.sha256(content.encode()).hexdigest()


def test_a_split_of_a_beir_folder(tmp_path, tokenizer):
    folder = making.beir_folder(tmp_path / "task")
    (folder / "qrels").mkdir()
    lines = (folder / "qrels.tsv").read_text().splitlines()
    (folder / "qrels" / "train.tsv").write_text("\n".join(lines[:3]) + "\n")
    (pool,) = inputs.open_pools(config(f"beir:{folder}?split=train"), tmp_path, tokenizer)
    assert pool.queries.ids.tolist() == ["q00", "q01"]
    with pytest.raises(ConfigError, match="unknown option 'part'"):
        inputs.open_pools(config(f"beir:{folder}?part=train"), tmp_path, tokenizer)
    (folder / "qrels" / "train.tsv").write_text(lines[0] + "\nq00\td00\t0\n")
    with pytest.raises(DataError, match=r"train\.tsv: no score is above 0"):
        inputs.open_pools(config(f"beir:{folder}?split=train"), tmp_path, tokenizer)


def test_a_union_shares_texts_and_takes_no_beir_folder(tmp_path, tokenizer):
    other = [("river", "copper thistle"), ("meadow", "stone cloud")]
    given = [
        {"name": "one", "path": pairs_file(tmp_path / "one.parquet", PAIRS)},
        {"name": "two", "path": pairs_file(tmp_path / "two.parquet", other)},
    ]
    (pool,) = inputs.open_pools(config(given, corpus="union"), tmp_path / "cache", tokenizer)
    assert positives(pool)["river"] == {"stone cloud", "ember violin", "copper thistle"}
    assert len(pool.documents) == 4
    given.append({"name": "task", "path": f"beir:{making.beir_folder(tmp_path / 'task')}"})
    with pytest.raises(ConfigError, match="input 'task' is a BEIR folder"):
        inputs.open_pools(config(given, corpus="union"), tmp_path / "cache", tokenizer)


def test_a_corpus_beside_the_pairs(tmp_path, tokenizer):
    """Also a stored one; queries are those of the pairs alone, and positives are of the corpus."""
    rows = {"text": ["meadow", "stone cloud", "copper"], "query": ["a", "b", "c"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "c.parquet")
    one = {"name": "p", "path": pairs_file(tmp_path / "p.parquet", PAIRS)}
    given = [{**one, "corpus": str(tmp_path / "c.parquet")}]
    (pool,) = inputs.open_pools(config(given), tmp_path / "cache", tokenizer)
    assert sorted(texts(pool.queries)) == ["harbour", "lantern", "river"]
    documents = {"stone cloud", "ember violin", "lantern", "meadow", "copper"}
    assert set(texts(pool.documents)) == documents and len(pool.documents) == 5
    assert positives(pool)["river"] == {"stone cloud", "ember violin"}
    (plain,) = inputs.open_pools(config([one]), tmp_path / "cache", tokenizer)
    assert plain.fingerprint != pool.fingerprint

    stored = catalog.open_cached(
        SourceConfig(name="c", path=given[0]["corpus"], document="text"),
        tmp_path / "stored",
        tokenizer,
    )
    given = [{**one, "corpus": str(stored.directory)}]
    (again,) = inputs.open_pools(config(given), tmp_path / "cache", tokenizer)
    assert again.fingerprint == pool.fingerprint

    given = [{"name": "t", "path": str(making.beir_folder(tmp_path / "t")), "corpus": "c.parquet"}]
    with pytest.raises(ConfigError, match="input 't': a BEIR folder brings its own corpus"):
        inputs.open_pools(config(given), tmp_path / "cache", tokenizer)


@pytest.mark.parametrize(
    "path, name",
    [
        ("data/squad.parquet", "squad"),
        ("beir:data/nf corpus?split=train", "nf_corpus"),
        ("hub:owner/set?split=train", "set"),
        ("data/folder/", "folder"),
    ],
)
def test_a_bare_path_is_named_by_its_last_part(path, name):
    assert [one.name for one in inputs.inputs_of(config(path))] == [name]


def test_changed_content_changes_the_fingerprint(tmp_path, tokenizer):
    found = {
        inputs.open_pools(
            config(pairs_file(tmp_path / f"{n}.parquet", PAIRS[: 4 + n])),
            tmp_path / "cache",
            tokenizer,
        )[0].fingerprint
        for n in (0, 1)
    }
    assert len(found) == 2
