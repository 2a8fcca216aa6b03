"""The encoder families: how each one's config.json is read and written, its module, and its tensor
names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from arcticjax.errors import CheckpointError, ConfigError
from arcticjax.models import bert, gte, modernbert, nomic_bert, rotary_bert
from arcticjax.models.hf_config import ConfigReader
from arcticjax.models.spec import ModelSpec, Pooling
from arcticjax.models.stack import Stack
from arcticjax.models.tensor_table import Entry


@dataclass(frozen=True)
class Names:
    """One way in which a family's checkpoints are written: its tensors and its config.json."""

    table: tuple[Entry, ...]
    write: Callable[[ModelSpec], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """An encoder family.

    read: from config.json to a spec's fields. native: names as transformers writes them; original:
    those of code that was published with the weights, where it is another. prefix: of tensors in a
    checkpoint with a head. unused: beginnings of names that may be present and are not used (heads,
    the dense pooler, constants of old files).
    """

    module: Callable[[ModelSpec, nnx.Rngs], Stack]
    read: Callable[[ConfigReader], dict[str, Any]]
    native: Names
    prefix: str
    unused: tuple[str, ...]
    original: Names | None = None


# By transformers' `model_type`.
FAMILIES: dict[str, Family] = {
    "bert": Family(
        module=bert.Bert,
        read=bert.read_bert,
        native=Names(bert.TABLE, bert.write_bert),
        prefix="bert.",
        unused=("embeddings.position_ids", "pooler.dense.", "cls."),
    ),
    "xlm-roberta": Family(
        module=bert.Bert,
        read=bert.read_xlm_roberta,
        native=Names(bert.TABLE, bert.write_xlm_roberta),
        prefix="roberta.",
        unused=("embeddings.position_ids", "pooler.dense.", "lm_head.", "classifier."),
    ),
    "nomic_bert": Family(
        module=rotary_bert.RotaryBert,
        read=nomic_bert.read,
        native=Names(nomic_bert.TABLE, nomic_bert.write),
        original=Names(nomic_bert.ORIGINAL_TABLE, nomic_bert.write_original),
        prefix="nomic_bert.",
        unused=("pooler.dense.", "cls."),
    ),
    "gte": Family(
        module=rotary_bert.RotaryBert,
        read=gte.read,
        native=Names(gte.TABLE, gte.write),
        original=Names(gte.ORIGINAL_TABLE, gte.write_original),
        prefix="gte.",
        unused=("pooler.dense.", "lm_head.", "classifier."),
    ),
    "modernbert": Family(
        module=modernbert.ModernBert,
        read=modernbert.read,
        native=Names(modernbert.TABLE, modernbert.write),
        prefix="model.",
        unused=("head.", "decoder.", "classifier."),
    ),
}

# What an original checkpoint calls itself, and its tensors in one with a head.
ALIASES = {"new": "gte"}
ORIGINAL_PREFIXES = {"nomic_bert": "bert.", "gte": "new."}


def is_original(content: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is in the form of code that was published with a family's weights:
    transformers cannot read it unless it runs that code."""
    return content.get("model_type") in ALIASES or nomic_bert.ORIGINAL_WIDTH in content


def read_config(content: Mapping[str, Any], pooling: Pooling) -> ModelSpec:
    """The spec that a Hugging Face `config.json` describes.

    `auto_map`, which names code in a model's repository, is passed over where this package computes
    what that code does, and refused elsewhere; none of it is ever run.

    Raises CheckpointError listing every problem.
    """
    config = ConfigReader(content)
    model_type = content.get("model_type")
    name = ALIASES.get(str(model_type), str(model_type))
    family = FAMILIES.get(name)
    if content.get("auto_map") and (family is None or family.original is None):
        config.problems.append(
            "auto_map asks for code from the model folder, which is never run: use a model "
            "of a built-in type"
        )
    if family is None:
        config.problems.append(
            f"model_type is {model_type!r}, known are {', '.join([*FAMILIES, *ALIASES])}"
        )
    else:
        fields = family.read(config)
        if not config.problems:
            try:
                return ModelSpec(family=name, pooling=pooling, **fields)
            except ConfigError as error:
                config.problems.append(str(error))
    raise CheckpointError(
        "the model's config.json does not describe an encoder that can be run here: "
        + "; ".join(config.problems)
    )
