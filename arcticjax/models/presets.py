"""Starting from a preset architecture with random weights."""

from __future__ import annotations

from pathlib import Path

import jax

from arcticjax import errors
from arcticjax.config.contract import TextContract
from arcticjax.models.encoder import Encoder
from arcticjax.models.pretrained import Pretrained
from arcticjax.models.spec import PRESETS, Pooling
from arcticjax.models.tokenizer import TextTokenizer


def random_start(
    preset: str,
    *,
    seed: int,
    tokenizer: str | Path,
    query_length: int,
    document_length: int,
    pooling: Pooling | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
) -> Pretrained:
    """An encoder of a preset's shape, weights drawn from `seed`; pooling defaults to the preset's,
    prompts to none.

    Raises ConfigError where the tokenizer or the lengths do not fit the preset.
    """
    spec = PRESETS[preset]
    found = TextTokenizer.from_file(Path(tokenizer))
    if found.vocab_size > spec.vocab_size:
        raise errors.ConfigError(
            f"model.tokenizer: {found.file} has {found.vocab_size} tokens, preset {preset} has "
            f"room for {spec.vocab_size}; choose a tokenizer that fits"
        )
    longest = max(query_length, document_length)
    if longest > spec.max_positions:
        raise errors.ConfigError(
            f"data.query_length / data.document_length: {longest} tokens, but preset {preset} "
            f"takes {spec.max_positions} at most"
        )
    contract = TextContract(
        query_prompt=query_prompt or "",
        document_prompt=document_prompt or "",
        query_length=query_length,
        document_length=document_length,
        pooling=pooling or spec.pooling,
    )
    params = jax.device_get(Encoder(spec).init(jax.random.key(seed)))
    return Pretrained(
        spec=spec,
        params=params,
        contract=contract,
        tokenizer_file=found.file,
        folder=found.file.parent,
        name=f"preset {preset}, seed {seed}",
        sha256="",
    )
