"""NomicBERT's config.json and tensor names: transformers' own, and those of the original code.

Original checkpoints name a module of their repository in `auto_map`. It is not run: their sizes
and weights are read here. Sources: transformers' `nomic_bert`, `nomic-ai/nomic-bert-2048` and
`nomic-ai/contrastors` on GitHub.
"""

from __future__ import annotations

from typing import Any

from arcticjax.models.hf_config import ConfigReader, rope_parameters
from arcticjax.models.spec import ModelSpec, Rotary
from arcticjax.models.tensor_table import Entry, dense, norm, same

_TABLES = (
    Entry("embeddings.word_embeddings.weight", ("embeddings/token",), same),
    Entry("embeddings.token_type_embeddings.weight", ("embeddings/type",), same),
)
_PROJECTIONS = ("layers/attention/query", "layers/attention/key", "layers/attention/value")

_LAYER = "layers.{layer}"
TABLE: tuple[Entry, ...] = (
    *_TABLES,
    *norm("embeddings.LayerNorm", "embeddings/norm"),
    *dense(f"{_LAYER}.self_attn.q_proj", "layers/attention/query", bias=False),
    *dense(f"{_LAYER}.self_attn.k_proj", "layers/attention/key", bias=False),
    *dense(f"{_LAYER}.self_attn.v_proj", "layers/attention/value", bias=False),
    *dense(f"{_LAYER}.self_attn.o_proj", "layers/attention/output", bias=False),
    *norm(f"{_LAYER}.post_attention_layernorm", "layers/attention/norm"),
    *dense(f"{_LAYER}.mlp.gate_proj", "layers/mlp/gate", bias=False),
    *dense(f"{_LAYER}.mlp.up_proj", "layers/mlp/up", bias=False),
    *dense(f"{_LAYER}.mlp.down_proj", "layers/mlp/down", bias=False),
    *norm(f"{_LAYER}.post_mlp_layernorm", "layers/mlp/norm"),
)

_OLD_LAYER = "encoder.layers.{layer}"
ORIGINAL_TABLE: tuple[Entry, ...] = (
    *_TABLES,
    *norm("emb_ln", "embeddings/norm"),
    *dense(f"{_OLD_LAYER}.attn.Wqkv", *_PROJECTIONS, bias=False),
    *dense(f"{_OLD_LAYER}.attn.out_proj", "layers/attention/output", bias=False),
    *norm(f"{_OLD_LAYER}.norm1", "layers/attention/norm"),
    *dense(f"{_OLD_LAYER}.mlp.fc12", "layers/mlp/gate", bias=False),
    *dense(f"{_OLD_LAYER}.mlp.fc11", "layers/mlp/up", bias=False),
    *dense(f"{_OLD_LAYER}.mlp.fc2", "layers/mlp/down", bias=False),
    *norm(f"{_OLD_LAYER}.norm2", "layers/mlp/norm"),
)

# The key of the original code's config.json that tells it from transformers'.
ORIGINAL_WIDTH = "n_embd"
_ORIGINAL_SIZES = {
    "vocab_size": "vocab_size",
    ORIGINAL_WIDTH: "hidden_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_inner": "intermediate_size",
    "type_vocab_size": "type_vocab_size",
}
# What the original code computes without these keys is not what is computed here, so they must be
# there.
_ORIGINAL_STATED = {
    "activation_function": "swiglu",
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "rotary_emb_fraction": 1.0,
}
_ORIGINAL_FIXED = {
    "prenorm": (False,),
    "causal": (False,),
    "parallel_block": (False,),
    "parallel_block_tied_norm": (False,),
    "use_rms_norm": (False, None),
    "rotary_emb_interleaved": (False,),
    "rotary_emb_scale_base": (None,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    # mixtures of experts, as in nomic-embed-text-v2-moe
    "moe_every_n_layers": (None, 0, -1),
    "num_experts": (None, 0),
}


def read(config: ConfigReader) -> dict[str, Any]:
    """A spec's fields from either form of the file."""
    if ORIGINAL_WIDTH in config.content:
        return _read_original(config)
    config.fixed("hidden_act", "silu")
    fields = config.sizes()
    width, heads = fields["hidden_size"], fields["num_heads"]
    config.fixed("head_dim", None, width // heads)
    trained = fields["max_positions"]
    rotary = config.rotary(1000.0, width // heads, trained)
    if rotary.trained_positions is not None:
        # transformers' form has no place for the longest text; this one is the original's
        fields["max_positions"] = config.size("n_positions", absent=int(trained * rotary.factor))
    padding = config.size("pad_token_id", least=0, absent=0)
    return {**fields, "rotary": rotary, "pad_token_id": padding}


def write(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of transformers' NomicBertModel."""
    assert spec.rotary is not None
    return {
        "architectures": ["NomicBertModel"],
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "silu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": spec.hidden_size,
        "initializer_range": spec.initializer_range,
        "intermediate_size": spec.intermediate_size,
        "layer_norm_eps": spec.layer_norm_epsilon,
        "max_position_embeddings": spec.rotary.trained_positions or spec.max_positions,
        "model_type": "nomic_bert",
        "n_positions": spec.max_positions,
        "num_attention_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
        "pad_token_id": spec.pad_token_id,
        "rope_parameters": rope_parameters(spec.rotary),
        "type_vocab_size": spec.type_vocab_size,
        "vocab_size": spec.vocab_size,
    }


def write_original(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of the original code, without the `auto_map` that names it."""
    assert spec.rotary is not None
    return {
        "architectures": ["NomicBertModel"],
        "model_type": "nomic_bert",
        **{hf_name: getattr(spec, field) for hf_name, field in _ORIGINAL_SIZES.items()},
        **_ORIGINAL_STATED,
        "initializer_range": spec.initializer_range,
        "layer_norm_epsilon": spec.layer_norm_epsilon,
        "max_trained_positions": spec.rotary.trained_positions or spec.max_positions,
        "n_positions": spec.max_positions,
        "pad_token_id": spec.pad_token_id,
        "prenorm": False,
        "rotary_emb_base": spec.rotary.theta,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": (
            None if spec.rotary.trained_positions is None else spec.rotary.factor
        ),
        "use_rms_norm": False,
    }


def _read_original(config: ConfigReader) -> dict[str, Any]:
    for key, value in _ORIGINAL_STATED.items():
        config.fixed(key, value, absent="missing")
    for key, values in _ORIGINAL_FIXED.items():
        config.fixed(key, *values)
    fields: dict[str, Any] = {field: config.size(key) for key, field in _ORIGINAL_SIZES.items()}
    trained = config.size("max_trained_positions", absent=2048)
    rotary = Rotary(config.number("rotary_emb_base", 10000.0))
    longest = config.size("n_positions", absent=trained)
    if config.content.get("rotary_scaling_factor") is not None:
        factor = config.number("rotary_scaling_factor", 1.0)
        rotary = Rotary(rotary.theta, factor=factor, trained_positions=trained)
    else:
        longest = min(trained, longest)
    return {
        **fields,
        "max_positions": longest,
        "layer_norm_epsilon": config.number("layer_norm_epsilon", 1e-5, below=1),
        "initializer_range": config.number("initializer_range", 0.02, below=1),
        "pad_token_id": config.size("pad_token_id", least=0, absent=0),
        "rotary": rotary,
    }
