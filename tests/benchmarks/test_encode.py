"""The benchmark of encoding: vectors of both sides compared, slots counted, texts drawn."""

import pytest

from benchmarks import encode, texts
from tests import tiny

DOCUMENTS = ["river stone", "stone " * 20, "grass " * 100]  # 4, 22 and, cut, 32 tokens
CAP = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("model"))


def row(folder, documents, peers):
    """One row; the peer, which takes half a minute to import, is our own encoder on `peers`."""
    with pytest.MonkeyPatch.context() as patch:
        theirs, *_ = encode.arctic(folder, peers, CAP, "float32")
        patch.setattr(encode, "sentence_transformers", lambda *_: theirs)
        return encode.measure(folder, documents, CAP, "float32", 1)


def test_the_lowest_cosine_and_the_fill_are_told(folder):
    same = row(folder, DOCUMENTS, DOCUMENTS)
    assert same["cosine"] > 0.99999
    assert same["fill"] == pytest.approx((4 + 22 + 32) / (64 * 32))  # a block of 8 rows a device
    other = row(folder, DOCUMENTS, [*DOCUMENTS[:2], "cloud"])
    assert other["cosine"] < 0.999
    assert other["documents"] == 3 and other["ratio_cpu"] > 0


def test_texts_are_drawn_without_repeats(tmp_path):
    pairs = [(f"query {number}", f"document {number}") for number in range(50)]
    texts.write(pairs, tmp_path / "pairs.parquet")
    found, origin = texts.pairs(tmp_path / "pairs.parquet", 20)
    assert len(set(found)) == 20 and set(found) <= set(pairs)
    assert origin == "20 of 50 pairs, pairs.parquet"
    documents, _ = texts.documents(tmp_path / "pairs.parquet", 20)
    assert documents == [document for _, document in found]
    with pytest.raises(SystemExit, match="holds 50 pairs, 51 are wanted"):
        texts.pairs(tmp_path / "pairs.parquet", 51)
