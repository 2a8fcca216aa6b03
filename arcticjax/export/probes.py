"""The texts on which an encoder and its folder are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from arcticjax.config.contract import TextContract
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.step.embedder import ROWS, Side, templates

# Of a block on a device: the usual rows of 512, and one of 4096 or more.
PROBE_TOKENS = 4096

Embed = Callable[[list[str], Side], np.ndarray]


@dataclass(frozen=True)
class Probe:
    """One text to compare. alone: in a batch of its own, since others would be padded to its
    length, and PyTorch scales the rotary positions of a batch by its longest text."""

    name: str
    side: Side
    text: str
    alone: bool = False


PROBES: tuple[Probe, ...] = (
    Probe("empty document", "document", ""),
    Probe("empty query", "query", ""),
    Probe("one token", "document", "water"),
    Probe("query", "query", "how do cranes sleep?"),
    Probe("document", "document", "Cranes sleep standing on one leg, often in shallow water."),
    Probe("upper case and digits", "document", "NASA's 2nd Report (v1.5): 3,000 km/h -- 100%"),
    Probe("accents", "query", "d\u00e9j\u00e0 vu e\u0301 \u00fcber Stra\u00dfe \u0130stanbul"),
    Probe("scripts", "document", "\u96ea\u3068\u306f \uc548\ub155 \u043f\u0440\u0438 \u05e9\u05dc"),
    Probe(
        "emoji",
        "document",
        "fine \U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    ),
    Probe("white space", "document", "  tab\tnew\nline\u00a0and\u200bzero\x00width \ufffd  "),
    Probe("special tokens as text", "document", "a [SEP] b [MASK] c [CLS] </s>"),
    Probe("one long word", "document", "x" * 300),
    # More than the 8192 tokens of the longest encoders: what is wrong only far from the start of a
    # text (rotary positions and their scaling, windows, a position table) is wrong here.
    Probe("truncated query", "query", " ".join(f"why {n}" for n in range(4200)), alone=True),
    Probe(
        "truncated document",
        "document",
        " ".join(f"word{n} of many," for n in range(2100)),
        alone=True,
    ),
)


def probes_for(contract: TextContract, tokenizer: TextTokenizer) -> tuple[Probe, ...]:
    """The probes on which an exact folder agrees.

    A folder has one maximum length: where queries are cut shorter in training, those longer than
    that are cut later in the folder, and have another vector.
    """
    longest = max(contract.query_length, contract.document_length)
    sides = {
        "query": (contract.query_prompt, contract.query_length),
        "document": (contract.document_prompt, contract.document_length),
    }
    chosen = []
    for probe in PROBES:
        prompt, length = sides[probe.side]
        tokens = 2 + len(tokenizer.encode([prompt + probe.text])[0])
        if length == longest or tokens <= length:
            chosen.append(probe)
    return tuple(chosen)


def probe_rows(contract: TextContract) -> int:
    """Rows that a device encodes at once: few tokens where rows are long, for few texts are."""
    longest = max(contract.query_length, contract.document_length)
    return min(ROWS, max(1, PROBE_TOKENS // longest))


def probe_vectors(embed: Embed, probes: Sequence[Probe]) -> np.ndarray:
    """float32 [probes, D], in the order of `probes`; matrix products at full float32 precision."""
    rows: dict[int, np.ndarray] = {}
    with jax.default_matmul_precision("highest"):
        for side in ("query", "document"):
            chosen = [index for index, probe in enumerate(probes) if probe.side == side]
            if chosen:
                vectors = embed([probes[index].text for index in chosen], side)
                rows.update(zip(chosen, np.asarray(vectors, np.float32), strict=True))
    return np.stack([rows[index] for index in range(len(probes))])


def probe_tokens(contract: TextContract, tokenizer: TextTokenizer, probe: Probe) -> np.ndarray:
    """Token ids of a probe as the encoder sees them, int32 [S]: special tokens, prompt, text, cut
    to its side's length."""
    template = templates(contract, tokenizer)[probe.side]
    text = tokenizer.encode([probe.text])[0]
    kept = text[: template.longest - template.overhead]
    parts = ([template.start_id], template.prompt, kept, [template.end_id])
    return np.concatenate(parts).astype(np.int32)
