"""Filling rows with tokens: start token, prompt, text cut to its cap, end token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arcticjax import errors


@dataclass(frozen=True)
class Template:
    """What surrounds a text's own tokens on one side (query or document), and its cap.

    start_id, end_id: special tokens; prompt: token ids; longest: cap in tokens, special tokens and
    prompt included. The prompt is never cut.
    """

    start_id: int
    prompt: np.ndarray
    end_id: int
    longest: int

    def __post_init__(self) -> None:
        if self.longest <= self.overhead:
            raise errors.ConfigError(
                f"data: a cap of {self.longest} tokens leaves no room for text beside 2 special "
                f"tokens and a prompt of {len(self.prompt)} tokens; raise data.query_length / "
                "data.document_length or shorten the prompt"
            )

    @property
    def overhead(self) -> int:
        """Tokens that are not the text's own."""
        return 2 + len(self.prompt)

    @property
    def head(self) -> np.ndarray:
        """Start token and prompt."""
        return np.concatenate([[self.start_id], self.prompt]).astype(np.int32)

    def lengths(self, own: np.ndarray) -> np.ndarray:
        """Tokens as encoded, from the texts' own token counts."""
        return np.minimum(np.asarray(own, np.int64) + self.overhead, self.longest)


def fill_rows(
    rows_RS: np.ndarray,
    texts: Sequence[np.ndarray],
    positions: np.ndarray,
    template: Template,
) -> None:
    """Writes texts into rows, in place.

    rows_RS: int32, C-contiguous; texts: each text's own token ids, uncut; positions: each text's
    first place in the flattened rows.
    """
    if not len(texts):
        return
    flat = rows_RS.reshape(-1)
    head = template.head
    room = template.longest - template.overhead
    own = np.minimum(np.fromiter(map(len, texts), np.int64, len(texts)), room)
    flat[positions[:, None] + np.arange(len(head))] = head
    ends = np.cumsum(own)
    tokens = np.concatenate([text[:room] for text in texts])
    # Place of every token: its text's first place plus its index within the text.
    flat[np.repeat(positions + len(head) - (ends - own), own) + np.arange(len(tokens))] = tokens
    flat[positions + len(head) + own] = template.end_id
