"""Writes an encoder as a sentence-transformers folder, complete or not at all.

The layout is the older one of sentence-transformers (module types `sentence_transformers.models.*`,
boolean pooling modes): current releases read it as well. Source: its documentation of
`modules.json`, and the published Arctic-Embed repositories.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np

from arcticjax import __version__
from arcticjax.config.contract import TextContract
from arcticjax.errors import CheckpointError, ConfigError, ResourceError
from arcticjax.export.card import CARD_FILE, Facts, card
from arcticjax.export.shards import SHARD_BYTES, write_shards
from arcticjax.models.hf_mapping import to_hf_state
from arcticjax.models.pretrained import read_json
from arcticjax.models.spec import ModelSpec
from arcticjax.models.tokenizer import TOKENIZER_FILE, TextTokenizer

# Marks a folder as ours, so that it may be replaced; holds what the other files cannot say.
OWN_FILE = "arcticjax.json"

Dtype = Literal["float32", "bfloat16"]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}

_POOLING_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "last": "pooling_mode_lasttoken",
}
# What of a foreign tokenizer_config.json is passed on: no class from the folder, no template, no
# path.
_TOKENIZER_SETTINGS = (
    "added_tokens_decoder",
    "clean_up_tokenization_spaces",
    "cls_token",
    "do_basic_tokenize",
    "do_lower_case",
    "mask_token",
    "model_input_names",
    "never_split",
    "pad_token",
    "padding_side",
    "sep_token",
    "strip_accents",
    "tokenize_chinese_chars",
    "tokenizer_class",
    "truncation_side",
    "unk_token",
)


@dataclass(frozen=True)
class Storage:
    """How a folder holds an encoder: the type of its weights, bytes of a weight file at most, and
    how many leading numbers of a vector it gives (Matryoshka; None: all)."""

    dtype: Dtype = "float32"
    shard_bytes: int = SHARD_BYTES
    truncate_dim: int | None = None

    def stored(self, params: Any) -> Any:
        """The parameters as they come back from such a folder, float32."""
        if self.dtype == "float32":
            return params
        return jax.tree.map(
            lambda leaf: np.asarray(leaf).astype(DTYPES[self.dtype]).astype(np.float32), params
        )


AS_IS = Storage()


def write_folder(
    output: Path,
    *,
    spec: ModelSpec,
    params: Mapping[str, Any],
    tokenizer_folder: Path,
    contract: TextContract,
    storage: Storage = AS_IS,
) -> Path:
    """Writes the folder `output` and returns it; an earlier export there is replaced at once.

    params: nested dict of NumPy or whole jax arrays. The folder's `max_seq_length` is the longer of
    the contract's two lengths: sentence-transformers' older layout has one for both sides.

    Raises ConfigError when `output` holds something else than an export or `storage` does not fit
    the model, CheckpointError when tokenizer and spec do not fit, ResourceError when it cannot be
    written.
    """
    output = Path(output).absolute()
    check_replaceable(output)
    check_truncation(storage.truncate_dim, spec)
    tokenizer = TextTokenizer.from_file(tokenizer_folder)
    if tokenizer.vocab_size > spec.vocab_size:
        raise CheckpointError(
            f"{tokenizer.file}: its highest token id is {tokenizer.vocab_size - 1}, the token "
            f"table has {spec.vocab_size} rows; this is not the model's tokenizer"
        )
    tensors = {
        name: np.ascontiguousarray(tensor, dtype=DTYPES[storage.dtype])
        for name, tensor in to_hf_state(spec, params).items()
    }
    staging = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        staging.mkdir(parents=True)
        _write_content(staging, spec, contract, storage, tokenizer)
        for file in write_shards(staging, tensors, storage.shard_bytes):
            # The library makes it readable by its owner only.
            shutil.copymode(staging / "config.json", file)
        sync(staging)
        move_into_place(staging, output)
    except OSError as error:
        raise ResourceError(
            f"{output}: the export cannot be written: {error}; free space or name another folder"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output


def check_truncation(truncate_dim: int | None, spec: ModelSpec) -> None:
    """Raises ConfigError unless vectors of a model of `spec` can be cut to so many numbers."""
    if truncate_dim is not None and not 1 <= truncate_dim < spec.hidden_size:
        raise ConfigError(
            f"truncate_dim: {truncate_dim} is not within 1 to {spec.hidden_size - 1}: the model's "
            f"vectors have {spec.hidden_size} numbers"
        )


def check_replaceable(output: Path) -> None:
    """Raises ConfigError unless `output` is absent, an empty folder or an earlier export."""
    if not output.exists():
        return
    if not output.is_dir():
        raise ConfigError(f"{output}: is a file; name a folder for the export")
    if any(output.iterdir()) and not (output / OWN_FILE).is_file():
        raise ConfigError(
            f"{output}: not empty and not an earlier export (it has no {OWN_FILE}); name a new "
            "folder"
        )


def move_into_place(source: Path, target: Path) -> None:
    """Renames folder `source` to `target`, whose earlier content is removed only afterwards."""
    aside = None
    if target.exists():
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
        target.rename(aside)
    source.rename(target)
    if aside is not None:
        shutil.rmtree(aside)


def sync(folder: Path) -> None:
    """Files first, then the folders that name them: what a rename shows must be on the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON that people read: indented, Unicode as it is."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_content(
    folder: Path,
    spec: ModelSpec,
    contract: TextContract,
    storage: Storage,
    tokenizer: TextTokenizer,
) -> None:
    """Everything but the weights."""
    longest = max(contract.query_length, contract.document_length)
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    if not contract.normalize:
        modules.pop()
    write_json(folder / "config.json", {**spec.to_hf(), "torch_dtype": storage.dtype})
    write_json(
        folder / "modules.json",
        [
            {
                "idx": index,
                "name": str(index),
                "path": path,
                "type": f"sentence_transformers.models.{kind}",
            }
            for index, (kind, path) in enumerate(modules)
        ],
    )
    (folder / "1_Pooling").mkdir()
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": spec.hidden_size,
            **{flag: kind == contract.pooling for kind, flag in _POOLING_FLAGS.items()},
            "include_prompt": True,
        },
    )
    if contract.normalize:
        (folder / "2_Normalize").mkdir()
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False}
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": {"arcticjax": __version__},
            "prompts": {"query": contract.query_prompt, "document": contract.document_prompt},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            **({} if storage.truncate_dim is None else {"truncate_dim": storage.truncate_dim}),
        },
    )
    _write_tokenizer(folder, tokenizer, spec)
    write_json(
        folder / OWN_FILE,
        {
            "version": __version__,
            "contract": contract.to_dict(),
            "tokenizer_sha256": tokenizer.sha256,
        },
    )
    text = card(spec, contract, storage.truncate_dim or spec.hidden_size, Facts())
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _write_tokenizer(folder: Path, tokenizer: TextTokenizer, spec: ModelSpec) -> None:
    source = tokenizer.file.parent
    shutil.copyfile(tokenizer.file, folder / TOKENIZER_FILE)
    given = read_json(source / "tokenizer_config.json", required=False)
    settings = {key: given[key] for key in _TOKENIZER_SETTINGS if key in given}
    if "tokenizer_class" not in settings:
        # The class that takes tokenizer.json as it is.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key, token in tokenizer.special_tokens().items():
        settings.setdefault(key, token)
    settings["model_max_length"] = spec.max_positions
    write_json(folder / "tokenizer_config.json", settings)
    for name in ("vocab.txt", "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
