"""GTE's config.json and tensor names: transformers' own, and those of the original code
(`NewModel`).

Original checkpoints name a module of another repository in `auto_map`. It is not run: their sizes
and weights are read here. Sources: transformers' `gte`, `Alibaba-NLP/new-impl` on the hub.
"""

from __future__ import annotations

from typing import Any

from arcticjax.models.hf_config import SIZES, ConfigReader, rope_parameters
from arcticjax.models.spec import ModelSpec
from arcticjax.models.tensor_table import Entry, dense, norm, same

_EMBEDDINGS = (
    Entry("embeddings.word_embeddings.weight", ("embeddings/token",), same),
    Entry("embeddings.token_type_embeddings.weight", ("embeddings/type",), same),
    *norm("embeddings.LayerNorm", "embeddings/norm"),
)
_PROJECTIONS = ("layers/attention/query", "layers/attention/key", "layers/attention/value")

_LAYER = "layers.{layer}"
TABLE: tuple[Entry, ...] = (
    *_EMBEDDINGS,
    *dense(f"{_LAYER}.self_attn.q_proj", "layers/attention/query"),
    *dense(f"{_LAYER}.self_attn.k_proj", "layers/attention/key"),
    *dense(f"{_LAYER}.self_attn.v_proj", "layers/attention/value"),
    *dense(f"{_LAYER}.self_attn.o_proj", "layers/attention/output"),
    *norm(f"{_LAYER}.post_attention_layernorm", "layers/attention/norm"),
    *dense(f"{_LAYER}.mlp.gate_proj", "layers/mlp/gate", bias=False),
    *dense(f"{_LAYER}.mlp.up_proj", "layers/mlp/up", bias=False),
    *dense(f"{_LAYER}.mlp.down_proj", "layers/mlp/down"),
    *norm(f"{_LAYER}.post_mlp_layernorm", "layers/mlp/norm"),
)

_OLD_LAYER = "encoder.layer.{layer}"
ORIGINAL_TABLE: tuple[Entry, ...] = (
    *_EMBEDDINGS,
    *dense(f"{_OLD_LAYER}.attention.qkv_proj", *_PROJECTIONS),
    *dense(f"{_OLD_LAYER}.attention.o_proj", "layers/attention/output"),
    *norm(f"{_OLD_LAYER}.attn_ln", "layers/attention/norm"),
    *dense(f"{_OLD_LAYER}.mlp.up_gate_proj", "layers/mlp/up", "layers/mlp/gate", bias=False),
    *dense(f"{_OLD_LAYER}.mlp.down_proj", "layers/mlp/down"),
    *norm(f"{_OLD_LAYER}.mlp_ln", "layers/mlp/norm"),
)

_SIZES = {key: field for key, field in SIZES.items() if key != "type_vocab_size"}


def read(config: ConfigReader) -> dict[str, Any]:
    """A spec's fields from either form of the file."""
    config.fixed("hidden_act", "gelu")
    config.fixed("position_embedding_type", "rope")
    config.fixed("layer_norm_type", "layer_norm")
    config.fixed("logn_attention_scale", False)
    config.fixed("is_decoder", False)
    fields = config.sizes(_SIZES)
    theta = 10_000.0 if config.content.get("model_type") == "new" else 160_000.0
    head_size = max(1, fields["hidden_size"] // fields["num_heads"])  # the spec refuses 0
    return {
        **fields,
        "type_vocab_size": config.size("type_vocab_size", least=0, absent=1),
        "rotary": config.rotary(theta, head_size, fields["max_positions"]),
        "pad_token_id": config.size("pad_token_id", least=0, absent=0),
    }


def write(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of transformers' GteModel."""
    assert spec.rotary is not None
    return {
        **_written(spec),
        "architectures": ["GteModel"],
        "model_type": "gte",
        "rope_parameters": rope_parameters(spec.rotary),
    }


def write_original(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of the original code, without the `auto_map` that names it."""
    rotary, scaling = spec.rotary, None
    assert rotary is not None
    theta = rotary.theta
    if rotary.divisor != 1:
        factor = rotary.divisor ** (spec.head_size / 2)
        theta, scaling = theta / factor, {"type": "ntk", "factor": factor}
    return {
        **_written(spec),
        "architectures": ["NewModel"],
        "layer_norm_type": "layer_norm",
        "logn_attention_scale": False,
        "model_type": "new",
        "pack_qkv": True,
        "position_embedding_type": "rope",
        "rope_scaling": scaling,
        "rope_theta": theta,
    }


def _written(spec: ModelSpec) -> dict[str, Any]:
    return {
        "attention_probs_dropout_prob": 0.0,
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
        "type_vocab_size": spec.type_vocab_size,
        "vocab_size": spec.vocab_size,
    }
