"""Texts to token ids, with the special tokens and prompt kept apart so that others can add them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from arcticjax.errors import CheckpointError, ConfigError, DataError

TOKENIZER_FILE = "tokenizer.json"
# The largest of the family (XLM-R, 250k pieces) takes 17 MB.
MAX_TOKENIZER_BYTES = 64 * 2**20

# Beginnings that tokenizers join differently to what stands before them.
_PROBE_TEXTS = (
    "what is snow",
    "Snow",
    "2024 figures",
    "-1 or +1",
    "(see below)",
    "##ing",
    "'s",
    ".",
    "\u96ea\u3068\u306f",
    "\u00e9t\u00e9",
    "\U0001f600 yes",
    " leading space",
    "",
)


class TextTokenizer:
    """A `tokenizer.json` behind one interface; safe to use from several threads.

    Truncation and padding are off for good: one tokenizer shared by callers that set different
    lengths is a race that yields ragged rows.

    `start_id` and `end_id` stand around every text ([CLS] and [SEP] in BERT); `pad_id` fills rows;
    `vocab_size` is the highest id of these and of the vocabulary, + 1; `sha256` is that of the
    file, in hex.
    """

    def __init__(self, file: Path, content: bytes) -> None:
        try:
            tokenizer = Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"{file}: not a tokenizer that can be read: {error}. Save it as {TOKENIZER_FILE} "
                f"with a current release of transformers"
            ) from None
        self.pad_id = _pad_id(tokenizer)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        around = tokenizer.encode("").ids
        if len(around) != 2:
            raise CheckpointError(
                f"{file}: puts {len(around)} special tokens around an empty text, expected 2 "
                f"(start and end); this tokenizer is not one of a BERT-like encoder"
            )
        self.file = file
        self.start_id, self.end_id = int(around[0]), int(around[1])
        known = tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = 1 + max(*known, self.start_id, self.end_id, self.pad_id)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._tokenizer = tokenizer

    @classmethod
    def from_file(cls, path: str | Path) -> TextTokenizer:
        """Reads a `tokenizer.json`, or the one in a folder.

        Raises ConfigError when there is none and CheckpointError when it cannot be used. Only this
        file is read: class names and templates in `tokenizer_config.json` have no effect.
        """
        file = Path(path).expanduser()
        if file.is_dir():
            file = file / TOKENIZER_FILE
        if not file.is_file():
            hint = ""
            if file.parent.is_dir() and (file.parent / "vocab.txt").is_file():
                hint = " (a bare vocab.txt does not say how texts are split)"
            raise ConfigError(
                f"{file}: no such file{hint}; give a folder that has {TOKENIZER_FILE}, or that "
                f"file, as model.tokenizer"
            )
        size = file.stat().st_size
        if size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(
                f"{file}: {size} bytes, more than the {MAX_TOKENIZER_BYTES} allowed"
            )
        return cls(file, file.read_bytes())

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (int32) of each text: no special tokens added, no prompt, nothing cut off.

        A text that spells a special token, such as '[SEP]', gets that token, as in transformers.
        Raises DataError naming the position of an item that is not text.
        """
        # The library would take one string for its characters, and a tuple for a pair of texts.
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise DataError(_bad_text(texts))
        try:
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise DataError(_bad_text(texts)) from None
        return [np.array(one.ids, dtype=np.int32) for one in encoded]

    def decode(self, ids: np.ndarray) -> str:
        """A text of these ids, to be read by people: what the tokenizer drops (case, spacing in
        many vocabularies) does not come back."""
        return self._tokenizer.decode([int(one) for one in ids], skip_special_tokens=False)

    def encode_prompt(self, prompt: str) -> np.ndarray:
        """Ids (int32) of a prompt that is put before texts; empty for an empty prompt.

        Raises ConfigError unless the ids of prompt + text are those of the prompt followed by those
        of the text: else stored token ids and whole strings, as others encode them, would differ.
        """
        if not prompt:
            return np.zeros(0, dtype=np.int32)
        ids = self.encode([prompt])[0]
        texts = self.encode(_PROBE_TEXTS)
        joined = self.encode([prompt + text for text in _PROBE_TEXTS])
        for text, own, whole in zip(_PROBE_TEXTS, texts, joined, strict=True):
            if not np.array_equal(whole, np.concatenate([ids, own])):
                raise ConfigError(
                    f"prompt {prompt!r} does not stand apart from the text: {prompt + text!r} is "
                    f"not tokenised as the prompt followed by {text!r}; end the prompt with a space"
                )
        return ids

    def same_tokens(self, other: TextTokenizer) -> bool:
        """Whether both give the same ids: vocabulary, special tokens, and how texts are split, as
        far as a few texts show. How files say to cut or pad makes no difference."""

        def of(one: TextTokenizer) -> tuple[Any, ...]:
            split = [ids.tolist() for ids in one.encode(_PROBE_TEXTS)]
            return one.start_id, one.end_id, split, one._tokenizer.get_vocab()

        return of(self) == of(other)

    def special_tokens(self) -> dict[str, str]:
        """The special tokens as written, by the names that transformers gives them; known ones
        only."""
        names = {
            "cls_token": self._tokenizer.id_to_token(self.start_id),
            "sep_token": self._tokenizer.id_to_token(self.end_id),
            "pad_token": self._tokenizer.id_to_token(self.pad_id),
            "unk_token": getattr(self._tokenizer.model, "unk_token", None),
        }
        return {name: token for name, token in names.items() if token}


def _pad_id(tokenizer: Tokenizer) -> int:
    if tokenizer.padding is not None:
        return int(tokenizer.padding["pad_id"])
    for token in ("[PAD]", "<pad>"):
        found = tokenizer.token_to_id(token)
        if found is not None:
            return int(found)
    return 0  # padding is masked by segment, so any id in the table serves


def _bad_text(texts: Sequence[str]) -> str:
    if isinstance(texts, str):
        return f"expected a list of texts, got one text, {texts[:40]!r}; write [text]"
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            return f"item {position} is {type(text).__name__}, expected text"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return (
                f"item {position} is not valid Unicode (it holds a lone surrogate): "
                f"{text[:40]!r}; read the file as UTF-8"
            )
    return "the texts cannot be tokenised"
