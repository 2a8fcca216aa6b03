"""What an encoder is: its family and sizes, the four presets, and the Hugging Face form of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from arcticjax.errors import CheckpointError, ConfigError

Pooling = Literal["cls", "mean", "last"]

POOLINGS: tuple[Pooling, ...] = ("cls", "mean", "last")
FAMILIES = ("bert",)

# Sizes that the two sides name differently; every one of them is a positive integer.
_HF_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "type_vocab_size",
}

# Settings that would change the forward pass, with the values that this encoder computes (first:
# what an absent key means). Any other key of a config either does not touch the forward pass at
# evaluation or needs custom code, which `auto_map` announces.
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
}


@dataclass(frozen=True)
class ModelSpec:
    """The sizes that fix an encoder's parameters and computation.

    `initializer_range` is the standard deviation of fresh weights. `pooling` is the model's own
    pooling, which a run may replace. Raises ConfigError if the sizes do not fit together.
    """

    family: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 384
    num_layers: int = 6
    num_heads: int = 12
    intermediate_size: int = 1536
    max_positions: int = 512
    type_vocab_size: int = 2
    layer_norm_epsilon: float = 1e-12
    initializer_range: float = 0.02
    pooling: Pooling = "cls"

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise ConfigError(
                "model spec: " + "; ".join(problems) + ". Correct these sizes and start again."
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    def parameter_count(self, with_pooler: bool = False) -> int:
        """Number of parameters; `with_pooler` adds BERT's unused dense pooler, as published
        counts do."""
        count = sum(math.prod(shape) for shape in parameter_shapes(self).values())
        return count + (self.hidden_size + 1) * self.hidden_size * with_pooler

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, pooling: Pooling = "cls") -> ModelSpec:
        """Reads the content of a Hugging Face `config.json`, which does not state the pooling.

        Raises CheckpointError listing every problem: custom code (`auto_map`), a model type or a
        setting that the encoder does not compute, a missing or impossible size.
        """
        problems = []
        if config.get("auto_map"):
            problems.append(
                "auto_map asks for code from the model folder, which is never run: use a model "
                "of a built-in type"
            )
        model_type = config.get("model_type")
        if model_type not in FAMILIES:
            problems.append(f"model_type is {model_type!r}, known are {', '.join(FAMILIES)}")
        for key, values in _HF_FIXED.items():
            value = config.get(key, values[0])
            if value not in values:
                problems.append(f"{key} is {value!r}, only {values[0]!r} is supported")
        sizes: dict[str, Any] = {}
        for key, name in _HF_SIZES.items():
            value = config.get(key)
            if type(value) is int and value > 0:
                sizes[name] = value
            else:
                state = f"is {value!r}" if key in config else "is missing"
                problems.append(f"{key} {state}, expected a positive integer")
        for key, name in (
            ("layer_norm_eps", "layer_norm_epsilon"),
            ("initializer_range", "initializer_range"),
        ):
            value = config.get(key, getattr(cls, name))
            if type(value) in (int, float) and 0 < value < 1:
                sizes[name] = float(value)
            else:
                problems.append(f"{key} is {value!r}, expected a number between 0 and 1")
        if not problems:
            try:
                return cls(family=str(model_type), pooling=pooling, **sizes)
            except ConfigError as error:
                problems.append(str(error))
        raise CheckpointError(
            "the model's config.json does not describe an encoder that can be run here: "
            + "; ".join(problems)
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of a Hugging Face `config.json`; `from_hf` of it gives this spec again,
        except for the pooling."""
        return {
            "architectures": ["BertModel"],
            "attention_probs_dropout_prob": 0.1,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "layer_norm_eps": self.layer_norm_epsilon,
            "max_position_embeddings": self.max_positions,
            "model_type": "bert",
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "pad_token_id": 0,
            "position_embedding_type": "absolute",
            "type_vocab_size": self.type_vocab_size,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its path (`layers/mlp/up/kernel`); layers are stacked on axis 0
    and kernels are [in, out]."""
    layers, width, inner = spec.num_layers, spec.hidden_size, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings/token": (spec.vocab_size, width),
        "embeddings/position": (spec.max_positions, width),
        "embeddings/type": (spec.type_vocab_size, width),
        "embeddings/norm/scale": (width,),
        "embeddings/norm/bias": (width,),
    }
    for name in ("query", "key", "value", "output"):
        shapes[f"layers/attention/{name}/kernel"] = (layers, width, width)
        shapes[f"layers/attention/{name}/bias"] = (layers, width)
    shapes["layers/mlp/up/kernel"] = (layers, width, inner)
    shapes["layers/mlp/up/bias"] = (layers, inner)
    shapes["layers/mlp/down/kernel"] = (layers, inner, width)
    shapes["layers/mlp/down/bias"] = (layers, width)
    for part in ("attention", "mlp"):
        shapes[f"layers/{part}/norm/scale"] = (layers, width)
        shapes[f"layers/{part}/norm/bias"] = (layers, width)
    return shapes


def _problems(spec: ModelSpec) -> list[str]:
    problems = [
        f"{name} is {getattr(spec, name)!r}, expected a positive integer"
        for name in _HF_SIZES.values()
        if type(getattr(spec, name)) is not int or getattr(spec, name) < 1
    ]
    if spec.family not in FAMILIES:
        problems.append(f"family is {spec.family!r}, known are {', '.join(FAMILIES)}")
    if spec.pooling not in POOLINGS:
        problems.append(f"pooling is {spec.pooling!r}, known are {', '.join(POOLINGS)}")
    if not problems and spec.hidden_size % spec.num_heads:
        problems.append(
            f"hidden_size {spec.hidden_size} is not a multiple of num_heads {spec.num_heads}"
        )
    return problems


# The encoders of Arctic-Embed 1.0 below the long-context one (arXiv 2405.05374, table of models).
PRESETS: dict[str, ModelSpec] = {
    "xs": ModelSpec(num_layers=6),
    "s": ModelSpec(num_layers=12),
    "m": ModelSpec(num_layers=12, hidden_size=768, intermediate_size=3072),
    "l": ModelSpec(num_layers=24, hidden_size=1024, num_heads=16, intermediate_size=4096),
}
