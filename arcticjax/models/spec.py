"""What an encoder is: its family and sizes, the presets, and the Hugging Face form of both."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from arcticjax.errors import ConfigError

Pooling = Literal["cls", "mean", "last"]

POOLINGS: tuple[Pooling, ...] = ("cls", "mean", "last")
# By transformers' `model_type`; what belongs to each is in `arcticjax.models.families`.
FAMILIES = ("bert", "xlm-roberta", "nomic_bert", "gte", "modernbert")
_ROTARY_FAMILIES = ("nomic_bert", "gte", "modernbert")

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "intermediate_size",
    "max_positions",
)


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: pair i of a head of K numbers turns by theta^(-2i/K) / divisor a position.

    trained_positions: in a text longer than this, theta grows with its length by `factor` (dynamic
    NTK scaling, see `arcticjax.models.rotary`); None: in none.
    """

    theta: float
    divisor: float = 1.0
    factor: float = 1.0
    trained_positions: int | None = None


@dataclass(frozen=True)
class Window:
    """Alternating attention: of `every` layers the first sees the whole text, in the others a token
    sees those up to `reach` places away, with rotary positions of base `theta`."""

    reach: int
    every: int
    theta: float


@dataclass(frozen=True)
class ModelSpec:
    """The sizes that fix an encoder's parameters and computation.

    `max_positions` is the longest text in tokens; 0 types are none. `initializer_range` is the
    standard deviation of fresh weights. `pooling` is the model's own pooling, which a run may
    replace. Raises ConfigError if the sizes do not fit together.
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
    pad_token_id: int = 0
    rotary: Rotary | None = None
    window: Window | None = None

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

    @property
    def position_offset(self) -> int:
        """Rows of the position table before that of a text's first token."""
        return self.pad_token_id + 1 if self.family == "xlm-roberta" else 0

    @property
    def mlp_matrices(self) -> int:
        """Matrices of a layer's perceptron: two, or three with a gate."""
        return 3 if self.rotary is not None else 2

    def parameter_count(self, with_pooler: bool = False) -> int:
        """Number of parameters; `with_pooler` adds BERT's unused dense pooler, as published
        counts do."""
        count = sum(math.prod(shape) for shape in parameter_shapes(self).values())
        if self.family == "modernbert":
            count -= self.hidden_size  # layer 0 has no norm before its attention
        return count + (self.hidden_size + 1) * self.hidden_size * with_pooler

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, pooling: Pooling = "cls") -> ModelSpec:
        """Reads the content of a Hugging Face `config.json`, which does not state the pooling.

        Raises CheckpointError listing every problem: custom code (`auto_map`) of a family that is
        not built in, a model type or a setting that the encoder does not compute, a missing or
        impossible size.
        """
        from arcticjax.models.families import read_config

        return read_config(config, pooling)

    def to_hf(self) -> dict[str, Any]:
        """The content of a Hugging Face `config.json`; `from_hf` of it gives this spec again,
        except for the pooling."""
        from arcticjax.models.families import FAMILIES

        return FAMILIES[self.family].native.write(self)


@functools.cache
def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    from flax.traverse_util import flatten_dict

    from arcticjax.models.encoder import Encoder

    abstract = cast("dict[str, Any]", flatten_dict(Encoder(spec).abstract(), sep="/"))
    return {path: tuple(leaf.shape) for path, leaf in abstract.items()}


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its path (`layers/mlp/up/kernel`); layers are stacked on axis 0
    and kernels are [in, out]."""
    return dict(_shapes(spec))


def _problems(spec: ModelSpec) -> list[str]:
    problems = [
        f"{name} is {getattr(spec, name)!r}, expected a positive integer"
        for name in _SIZES
        if type(getattr(spec, name)) is not int or getattr(spec, name) < 1
    ]
    if spec.family not in FAMILIES:
        problems.append(f"family is {spec.family!r}, known are {', '.join(FAMILIES)}")
    if spec.pooling not in POOLINGS:
        problems.append(f"pooling is {spec.pooling!r}, known are {', '.join(POOLINGS)}")
    if spec.type_vocab_size < (0 if spec.family in ("gte", "modernbert") else 1):
        problems.append(f"type_vocab_size is {spec.type_vocab_size!r}, expected a positive integer")
    if problems:
        return problems
    if spec.hidden_size % spec.num_heads:
        problems.append(
            f"hidden_size {spec.hidden_size} is not a multiple of num_heads {spec.num_heads}"
        )
    if not 0 <= spec.pad_token_id < spec.vocab_size:
        problems.append(f"pad_token_id {spec.pad_token_id} is not one of {spec.vocab_size} tokens")
    if (spec.rotary is not None) != (spec.family in _ROTARY_FAMILIES):
        problems.append(f"rotary is {spec.rotary}, which does not go with family {spec.family}")
    if (spec.window is not None) != (spec.family == "modernbert"):
        problems.append(f"window is {spec.window}, which does not go with family {spec.family}")
    if spec.rotary is not None and (spec.head_size % 2 or spec.head_size < 4):
        problems.append(f"heads of {spec.head_size} numbers have no pairs to turn")
    if spec.rotary is not None and spec.rotary.divisor != 1 and spec.rotary.trained_positions:
        problems.append("rotary has both a divisor and trained_positions; only one is supported")
    return problems


_MODERNBERT = ModelSpec(
    family="modernbert",
    vocab_size=50368,
    hidden_size=768,
    num_layers=22,
    intermediate_size=1152,
    max_positions=8192,
    type_vocab_size=0,
    layer_norm_epsilon=1e-5,
    pad_token_id=50283,
    rotary=Rotary(160_000.0),
    window=Window(reach=64, every=3, theta=10_000.0),
)
_M = ModelSpec(num_layers=12, hidden_size=768, intermediate_size=3072)

# The encoders of Arctic-Embed 1.0 and 2.0 (arXiv 2405.05374 and 2412.04506, tables of models) and
# of ModernBERT (arXiv 2412.13663), by the config.json published with each.
PRESETS: dict[str, ModelSpec] = {
    "xs": ModelSpec(num_layers=6),
    "s": ModelSpec(num_layers=12),
    "m": _M,
    "m-v1.5": _M,
    "m-long": ModelSpec(
        family="nomic_bert",
        vocab_size=30528,
        hidden_size=768,
        num_layers=12,
        intermediate_size=3072,
        max_positions=8192,
        rotary=Rotary(1000.0, factor=2.0, trained_positions=2048),
    ),
    "l": ModelSpec(num_layers=24, hidden_size=1024, num_heads=16, intermediate_size=4096),
    "m-v2": ModelSpec(
        family="gte",
        vocab_size=250048,
        hidden_size=768,
        num_layers=12,
        intermediate_size=3072,
        max_positions=8192,
        type_vocab_size=1,
        pad_token_id=1,
        rotary=Rotary(160_000.0),
    ),
    "l-v2": ModelSpec(
        family="xlm-roberta",
        vocab_size=250002,
        hidden_size=1024,
        num_layers=24,
        num_heads=16,
        intermediate_size=4096,
        max_positions=8192,
        type_vocab_size=1,
        layer_norm_epsilon=1e-5,
        pad_token_id=1,
    ),
    "modernbert-base": _MODERNBERT,
    "modernbert-large": dataclasses.replace(
        _MODERNBERT, hidden_size=1024, num_layers=28, num_heads=16, intermediate_size=2624
    ),
}
