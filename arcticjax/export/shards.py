"""Weights as safetensors files, in shards with an index where one file would be too large."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file

from arcticjax.models.safe_weights import WEIGHTS, WEIGHTS_INDEX

# What Hugging Face's libraries take when nothing is said.
SHARD_BYTES = 5 * 10**9


def write_shards(
    folder: Path, tensors: Mapping[str, np.ndarray], shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Writes `model.safetensors`, or shards of at most `shard_bytes` of tensors and their index.

    A single tensor that is larger has a shard of its own. Names of files and form of the index are
    Hugging Face's. Returns the weight files.
    """
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=WEIGHTS.replace(".", "{suffix}.", 1),
        max_shard_size=shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        # The 'pt' mark is what transformers looks for before it reads a safetensors file.
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / WEIGHTS_INDEX).write_text(text, encoding="utf-8")
    return [folder / file for file in split.filename_to_tensors]
