"""BERT and XLM-RoBERTa: post-norm encoder layers over token, position and type tables.

The two differ in their tables only: XLM-RoBERTa's first position is the row after that of its
padding token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from arcticjax.models.attention import Implementation
from arcticjax.models.hf_config import ConfigReader
from arcticjax.models.layers import Attention, LayerNorm, Mlp, look_up, normal
from arcticjax.models.spec import ModelSpec
from arcticjax.models.stack import Own, Shared, Stack
from arcticjax.models.tensor_table import Entry, dense, norm, same

if TYPE_CHECKING:
    from jaxtyping import Array


class Embeddings(nnx.Module):
    """The sum of token, position and type-0 vectors, normalised."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        deviation, width = spec.initializer_range, spec.hidden_size
        positions = spec.position_offset + spec.max_positions
        self.token = nnx.Param(normal(rngs, (spec.vocab_size, width), deviation))
        self.position = nnx.Param(normal(rngs, (positions, width), deviation))
        self.type = nnx.Param(normal(rngs, (spec.type_vocab_size, width), deviation))
        self.norm = LayerNorm(width, spec.layer_norm_epsilon)
        self.position_offset = spec.position_offset

    def __call__(self, tokens_RS: Array, positions_RS: Array) -> Array:
        if self.position_offset:
            positions_RS = positions_RS + self.position_offset
        # float32 whatever the compute dtype: the gradient of a gather adds up many small terms
        x_RSD = look_up(self.token[...], tokens_RS) + look_up(self.position[...], positions_RS)
        return self.norm(x_RSD + self.type[...][0])


class Layer(nnx.Module):
    """Self-attention, then the perceptron; each is added to its input and the sum normalised."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        self.attention = Attention(spec, rngs)
        self.mlp = Mlp(spec, rngs)

    def __call__(
        self,
        x_RSD: Array,
        shared: Shared,
        own: Own,
        *,
        dtype: jax.typing.DTypeLike,
        attention: Implementation,
    ) -> Array:
        """`shared` are the segments; see `Stack`."""
        attended = self.attention(x_RSD, shared, attention)
        x_RSD = self.attention.norm(x_RSD, attended, dtype=dtype)
        return self.mlp.norm(x_RSD, self.mlp(x_RSD), dtype=dtype)


class Bert(Stack):
    """The whole encoder without pooler."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        self.embeddings = Embeddings(spec, rngs)
        self.layers = nnx.vmap(lambda layer_rngs: Layer(spec, layer_rngs))(
            rngs.split(spec.num_layers)
        )


_LAYER = "encoder.layer.{layer}"
TABLE: tuple[Entry, ...] = (
    Entry("embeddings.word_embeddings.weight", ("embeddings/token",), same),
    Entry("embeddings.position_embeddings.weight", ("embeddings/position",), same),
    Entry("embeddings.token_type_embeddings.weight", ("embeddings/type",), same),
    *norm("embeddings.LayerNorm", "embeddings/norm"),
    *dense(f"{_LAYER}.attention.self.query", "layers/attention/query"),
    *dense(f"{_LAYER}.attention.self.key", "layers/attention/key"),
    *dense(f"{_LAYER}.attention.self.value", "layers/attention/value"),
    *dense(f"{_LAYER}.attention.output.dense", "layers/attention/output"),
    *norm(f"{_LAYER}.attention.output.LayerNorm", "layers/attention/norm"),
    *dense(f"{_LAYER}.intermediate.dense", "layers/mlp/up"),
    *dense(f"{_LAYER}.output.dense", "layers/mlp/down"),
    *norm(f"{_LAYER}.output.LayerNorm", "layers/mlp/norm"),
)


def read_bert(config: ConfigReader) -> dict[str, Any]:
    """A spec's fields from BERT's config.json."""
    _settle(config)
    return {**config.sizes(), "pad_token_id": config.size("pad_token_id", least=0, absent=0)}


def write_bert(spec: ModelSpec) -> dict[str, Any]:
    """BERT's config.json."""
    return {**_written(spec), "architectures": ["BertModel"], "model_type": "bert"}


def read_xlm_roberta(config: ConfigReader) -> dict[str, Any]:
    """A spec's fields from XLM-RoBERTa's config.json, whose position table begins with rows that no
    token of a text has."""
    _settle(config)
    fields = config.sizes()
    padding = config.size("pad_token_id", least=0, absent=1)
    fields["max_positions"] -= padding + 1
    return {**fields, "pad_token_id": padding}


def write_xlm_roberta(spec: ModelSpec) -> dict[str, Any]:
    """XLM-RoBERTa's config.json."""
    return {
        **_written(spec),
        "architectures": ["XLMRobertaModel"],
        "model_type": "xlm-roberta",
        "max_position_embeddings": spec.position_offset + spec.max_positions,
    }


def _settle(config: ConfigReader) -> None:
    config.fixed("hidden_act", "gelu")
    config.fixed("position_embedding_type", "absolute", None)
    for key in ("is_decoder", "add_cross_attention", "is_encoder_decoder"):
        config.fixed(key, False)


def _written(spec: ModelSpec) -> dict[str, Any]:
    return {
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": spec.hidden_size,
        "initializer_range": spec.initializer_range,
        "intermediate_size": spec.intermediate_size,
        "layer_norm_eps": spec.layer_norm_epsilon,
        "max_position_embeddings": spec.max_positions,
        "num_attention_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
        "pad_token_id": spec.pad_token_id,
        "position_embedding_type": "absolute",
        "type_vocab_size": spec.type_vocab_size,
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }
