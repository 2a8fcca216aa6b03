"""The tokenizer: raw ids, special tokens kept apart, prompts that stand apart, threads,
refusals."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tokenizers import Tokenizer

from arcticjax.errors import CheckpointError, ConfigError, DataError
from arcticjax.models import tokenizer as tokenizer_module
from arcticjax.models.resolve import resolve
from arcticjax.models.tokenizer import TextTokenizer

FOLDER = resolve("sentence-transformers/all-MiniLM-L6-v2")


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.from_file(FOLDER)


def test_special_ids_and_identity(tokenizer):
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) == (101, 102, 0)
    assert tokenizer.vocab_size == 30522
    content = (FOLDER / "tokenizer.json").read_bytes()
    assert tokenizer.sha256 == hashlib.sha256(content).hexdigest()
    assert TextTokenizer.from_file(FOLDER / "tokenizer.json").sha256 == tokenizer.sha256


def test_ids_are_bare_and_whole(tokenizer):
    # The file itself truncates and pads to 128 and adds special tokens: none of it may come
    # through.
    long = "river " * 700
    empty, short, whole = tokenizer.encode(["", "Hello World", long])
    assert empty.size == 0
    assert short.tolist() == [7592, 2088]
    assert whole.tolist() == [2314] * 700
    assert {ids.dtype for ids in (empty, short, whole)} == {np.dtype(np.int32)}
    assert tokenizer.encode([]) == []


def test_threads_agree_with_one_thread(tokenizer):
    texts = [f"text {n} " * (n % 50) for n in range(400)]
    alone = [ids.tolist() for ids in tokenizer.encode(texts)]
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: tokenizer.encode(texts), range(8)):
            assert [ids.tolist() for ids in found] == alone


@pytest.mark.parametrize("prompt", ["query: ", "Represent this sentence for searching: ", "a b\n"])
def test_prompt_then_text_is_the_whole(tokenizer, prompt):
    ids = tokenizer.encode_prompt(prompt)
    assert ids.size
    for text in ("what is snow?", "-5 degrees", "\u00e9t\u00e9"):
        whole, own = tokenizer.encode([prompt + text, text])
        assert np.array_equal(whole, np.concatenate([ids, own]))


def test_prompt_that_melts_into_the_text_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="end the prompt with a space"):
        tokenizer.encode_prompt("query")
    assert tokenizer.encode_prompt("").size == 0


def test_bad_texts_are_named_by_position(tokenizer):
    with pytest.raises(DataError, match="item 1 is NoneType"):
        tokenizer.encode(["fine", None])
    with pytest.raises(DataError, match=r"item 2 .* surrogate"):
        tokenizer.encode(["fine", "fine", "\ud800"])


def test_missing_file_names_what_is_needed(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json: no such file"):
        TextTokenizer.from_file(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(ConfigError, match=r"vocab\.txt"):
        TextTokenizer.from_file(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "Nonsense"}}'])
def test_malformed_file_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a tokenizer that can be read"):
        TextTokenizer.from_file(tmp_path)


def test_oversized_file_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "MAX_TOKENIZER_BYTES", 10)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 11)
    with pytest.raises(CheckpointError, match="11 bytes, more than the 10 allowed"):
        TextTokenizer.from_file(tmp_path)


def test_same_tokens_whatever_a_file_says_of_cutting_and_padding(tokenizer, tmp_path):
    other = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    other.enable_truncation(7)
    other.enable_padding(length=9)
    other.save(str(tmp_path / "tokenizer.json"))
    same = TextTokenizer.from_file(tmp_path)
    assert same.sha256 != tokenizer.sha256 and same.same_tokens(tokenizer)


@pytest.mark.parametrize("change", ["lower case", "vocabulary"])
def test_other_tokens(tokenizer, tmp_path, change):
    content = json.loads((FOLDER / "tokenizer.json").read_text())
    if change == "lower case":
        content["normalizer"]["lowercase"] = False
    else:
        content["model"]["vocab"]["more"] = 30522
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert not TextTokenizer.from_file(tmp_path).same_tokens(tokenizer)


def test_tokenizer_without_start_and_end_is_refused(tmp_path):
    content = json.loads((FOLDER / "tokenizer.json").read_text())
    content["post_processor"] = None
    Tokenizer.from_str(json.dumps(content)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="0 special tokens around an empty text"):
        TextTokenizer.from_file(tmp_path)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ("one text", r"got one text, 'one text'; write \[text\]"),
        (["a", ("a", "b")], "item 1 is tuple, expected text"),
        ([["a", "b"]], "item 0 is list, expected text"),
        (["a", None], "item 1 is NoneType, expected text"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(tokenizer, texts, words):
    with pytest.raises(DataError, match=words):
        tokenizer.encode(texts)
