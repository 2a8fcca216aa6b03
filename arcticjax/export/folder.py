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
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from arcticjax import __version__
from arcticjax.config.contract import TextContract
from arcticjax.errors import CheckpointError, ConfigError, ResourceError
from arcticjax.models.hf_mapping import to_hf_state
from arcticjax.models.pretrained import read_json
from arcticjax.models.spec import ModelSpec
from arcticjax.models.tokenizer import TOKENIZER_FILE, TextTokenizer

# Marks a folder as ours, so that it may be replaced; holds what the other files cannot say.
OWN_FILE = "arcticjax.json"

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

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


def write_folder(
    output: Path,
    *,
    spec: ModelSpec,
    params: Mapping[str, Any],
    tokenizer_folder: Path,
    contract: TextContract,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> Path:
    """Writes the folder `output` and returns it; an earlier export there is replaced at once.

    params: nested dict of NumPy or whole jax arrays. The folder's `max_seq_length` is the longer of
    the contract's two lengths: sentence-transformers' older layout has one for both sides.

    Raises ConfigError when `output` holds something else than an export, CheckpointError when
    tokenizer and spec do not fit, ResourceError when it cannot be written.
    """
    output = Path(output).absolute()
    check_replaceable(output)
    tokenizer = TextTokenizer.from_file(tokenizer_folder)
    if tokenizer.vocab_size > spec.vocab_size:
        raise CheckpointError(
            f"{tokenizer.file}: its highest token id is {tokenizer.vocab_size - 1}, the token "
            f"table has {spec.vocab_size} rows; this is not the model's tokenizer"
        )
    tensors = {
        name: np.ascontiguousarray(tensor, dtype=DTYPES[dtype])
        for name, tensor in to_hf_state(spec, params).items()
    }
    staging = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        staging.mkdir(parents=True)
        _write_content(staging, spec, contract, dtype, tokenizer)
        # The 'pt' mark is what transformers looks for before it reads a safetensors file.
        save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
        # The library makes it readable by its owner only.
        shutil.copymode(staging / "config.json", staging / "model.safetensors")
        sync(staging)
        move_into_place(staging, output)
    except OSError as error:
        raise ResourceError(
            f"{output}: the export cannot be written: {error}; free space or name another folder"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output


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
    folder: Path, spec: ModelSpec, contract: TextContract, dtype: str, tokenizer: TextTokenizer
) -> None:
    """Everything but the weights."""
    longest = max(contract.query_length, contract.document_length)
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    if not contract.normalize:
        modules.pop()
    write_json(folder / "config.json", {**spec.to_hf(), "torch_dtype": dtype})
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
    (folder / "README.md").write_text(_card(spec, contract, longest), encoding="utf-8")


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


def _card(spec: ModelSpec, contract: TextContract, longest: int) -> str:
    prompts = json.dumps(
        {"query": contract.query_prompt, "document": contract.document_prompt}, ensure_ascii=False
    )
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
- sentence-similarity
---

# Text embedding model

A {spec.family} encoder with {spec.num_layers} layers that maps a text to a vector of \
{spec.hidden_size} numbers, trained with arcticjax.

| | |
|---|---|
| pooling | {contract.pooling} |
| vectors | {"unit length" if contract.normalize else "as pooled"}; compare by cosine |
| query length in training | {contract.query_length} tokens |
| document length in training | {contract.document_length} tokens |
| longest text | {longest} tokens (`max_seq_length`) |

Prompts, which `encode_query` and `encode_document` put before the text:

```json
{prompts}
```

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
queries = model.encode_query(["how do cranes sleep?"])
documents = model.encode_document(["Cranes sleep standing on one leg.", "A crane lifts loads."])
print(model.similarity(queries, documents))
```

`certificate.json`, where present, lists the texts on which these files were compared with the
encoder as trained, and the largest difference.
"""
