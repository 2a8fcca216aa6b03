"""ModernBERT (Warner et al. 2024, arXiv 2412.13663): pre-norm layers without biases, rotary
positions, a gated perceptron, and attention that sees the whole text in every third layer and a
window in the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from arcticjax.models.activations import gelu
from arcticjax.models.attention import Implementation
from arcticjax.models.hf_config import SIZES, ConfigReader
from arcticjax.models.layers import Attention, GatedMlp, LayerNorm, add, look_up, normal
from arcticjax.models.rotary import rotation
from arcticjax.models.spec import ModelSpec, Rotary, Window
from arcticjax.models.stack import Own, Shared, Stack
from arcticjax.models.tensor_table import Entry, dense, norm, same

if TYPE_CHECKING:
    from jaxtyping import Array


class Embeddings(nnx.Module):
    """Token vectors, normalised."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        shape = (spec.vocab_size, spec.hidden_size)
        self.token = nnx.Param(normal(rngs, shape, spec.initializer_range))
        self.norm = LayerNorm(spec.hidden_size, spec.layer_norm_epsilon, bias=False)

    def __call__(self, tokens_RS: Array, positions_RS: Array) -> Array:
        del positions_RS  # they enter in attention
        return self.norm(look_up(self.token[...], tokens_RS))


class Layer(nnx.Module):
    """Self-attention, then the perceptron; each reads the normalised states and adds to them.

    What is added to is float32 whatever the compute dtype: nothing normalises it between layers,
    so rounding would add up.
    """

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        self.attention = Attention(spec, rngs, bias=False, norm_bias=False)
        self.mlp = GatedMlp(spec, rngs, gelu, down_bias=False, norm_bias=False)

    def __call__(
        self,
        x_RSD: Array,
        shared: Shared,
        own: Own,
        *,
        dtype: jax.typing.DTypeLike,
        attention: Implementation,
    ) -> Array:
        """See `Stack`."""
        (segments_RS, everywhere, nearby), (is_first, is_global, reach) = shared, own
        turns = jax.tree.map(
            lambda one, other: jnp.where(is_global, one, other), everywhere, nearby
        )
        # the first layer's input comes from a norm already
        inputs_RSD = jnp.where(is_first, x_RSD, self.attention.norm(x_RSD)).astype(dtype)
        attended = self.attention(inputs_RSD, segments_RS, attention, turns, reach)
        x_RSD = add(x_RSD, attended)
        return add(x_RSD, self.mlp(self.mlp.norm(x_RSD, dtype=dtype)))


class ModernBert(Stack):
    """The whole encoder."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        self.embeddings = Embeddings(spec, rngs)
        self.layers = nnx.vmap(lambda layer_rngs: Layer(spec, layer_rngs))(
            rngs.split(spec.num_layers)
        )
        self.final_norm = LayerNorm(spec.hidden_size, spec.layer_norm_epsilon, bias=False)
        self.spec = spec

    def enter(self, tokens_RS: Array, positions_RS: Array, dtype: jax.typing.DTypeLike) -> Array:
        """What the first layer reads, in float32 (see `Layer`)."""
        return self.embeddings(tokens_RS, positions_RS)

    def shared(self, segments_RS: Array, positions_RS: Array) -> Shared:
        """Segments, and how far each position turns in layers that see the whole text and in the
        others."""
        spec, window = self.spec, self.spec.window
        assert spec.rotary is not None and window is not None
        turns = (
            rotation(rotary, spec.head_size, positions_RS, spec.max_positions)
            for rotary in (spec.rotary, Rotary(window.theta))
        )
        return segments_RS, *turns

    def own(self, row_length: int) -> Own:
        """Whether a layer is the first, whether it sees the whole text, and how far it sees."""
        assert self.spec.window is not None
        number = np.arange(self.spec.num_layers)
        is_global = number % self.spec.window.every == 0
        reach = np.where(is_global, row_length, self.spec.window.reach).astype(np.int32)
        return tuple(jnp.asarray(one) for one in (number == 0, is_global, reach))

    def leave(self, x_RSD: Array, dtype: jax.typing.DTypeLike) -> Array:
        """The last hidden states, normalised."""
        return self.final_norm(x_RSD, dtype=dtype)


_LAYER = "layers.{layer}"
_PROJECTIONS = ("layers/attention/query", "layers/attention/key", "layers/attention/value")
TABLE: tuple[Entry, ...] = (
    Entry("embeddings.tok_embeddings.weight", ("embeddings/token",), same),
    *norm("embeddings.norm", "embeddings/norm", bias=False),
    *norm(f"{_LAYER}.attn_norm", "layers/attention/norm", bias=False, first_layer=1),
    *dense(f"{_LAYER}.attn.Wqkv", *_PROJECTIONS, bias=False),
    *dense(f"{_LAYER}.attn.Wo", "layers/attention/output", bias=False),
    *norm(f"{_LAYER}.mlp_norm", "layers/mlp/norm", bias=False),
    *dense(f"{_LAYER}.mlp.Wi", "layers/mlp/gate", "layers/mlp/up", bias=False),
    *dense(f"{_LAYER}.mlp.Wo", "layers/mlp/down", bias=False),
    *norm("final_norm", "final_norm", bias=False),
)

_SIZES = {key: field for key, field in SIZES.items() if key != "type_vocab_size"}
_THETA, _LOCAL_THETA = 160_000.0, 10_000.0


def read(config: ConfigReader) -> dict[str, Any]:
    """A spec's fields from ModernBERT's config.json, in transformers' newer or older form."""
    config.fixed("hidden_activation", "gelu")
    for key in ("norm_bias", "attention_bias", "mlp_bias"):
        config.fixed(key, False)
    fields = config.sizes(_SIZES)
    theta, local_theta = _read_thetas(config)
    every = _read_pattern(config, fields["num_layers"])
    reach = config.size("local_attention", absent=128) // 2
    return {
        **fields,
        "layer_norm_epsilon": config.number("norm_eps", 1e-5, below=1),
        "type_vocab_size": 0,
        "rotary": Rotary(theta),
        "window": Window(reach=reach, every=every, theta=local_theta),
        "pad_token_id": config.size("pad_token_id", least=0, absent=0),
    }


def write(spec: ModelSpec) -> dict[str, Any]:
    """ModernBERT's config.json, as older and newer releases of transformers read it."""
    assert spec.rotary is not None and spec.window is not None
    window = spec.window
    return {
        "architectures": ["ModernBertModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "global_attn_every_n_layers": window.every,
        "global_rope_theta": spec.rotary.theta,
        "hidden_activation": "gelu",
        "hidden_size": spec.hidden_size,
        "initializer_range": spec.initializer_range,
        "intermediate_size": spec.intermediate_size,
        "local_attention": 2 * window.reach,
        "local_rope_theta": window.theta,
        "max_position_embeddings": spec.max_positions,
        "mlp_bias": False,
        "mlp_dropout": 0.0,
        "model_type": "modernbert",
        "norm_bias": False,
        "norm_eps": spec.layer_norm_epsilon,
        "num_attention_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
        "pad_token_id": spec.pad_token_id,
        "vocab_size": spec.vocab_size,
    }


def _read_thetas(config: ConfigReader) -> tuple[float, float]:
    kinds = (
        ("full_attention", "global_rope_theta", _THETA),
        ("sliding_attention", "local_rope_theta", _LOCAL_THETA),
    )
    config.fixed("rope_scaling", None)
    newer = config.content.get("rope_parameters") or {}
    found = []
    for kind, older, default in kinds:
        given = (newer.get(kind) if isinstance(newer, Mapping) else newer) or {}
        if not isinstance(given, Mapping):
            config.problems.append(f"rope_parameters is {newer!r}, expected objects by layer type")
            given = {}
        if given.get("rope_type", "default") != "default":
            config.problems.append(f"rope_parameters of {kind} are not of rope_type 'default'")
        if "rope_theta" in given:
            found.append(config.number("rope_theta", default, within=given))
        else:
            found.append(config.number(older, default))
    return found[0], found[1]


def _read_pattern(config: ConfigReader, layers: int) -> int:
    """Every how many layers one sees the whole text, the first included."""
    types = config.content.get("layer_types")
    if types is None:
        return config.size("global_attn_every_n_layers", absent=3)
    if isinstance(types, list) and len(types) == layers:
        every = types.index("full_attention", 1) if "full_attention" in types[1:] else layers
        pattern = ("full_attention", *["sliding_attention"] * (every - 1))
        if types == [pattern[layer % every] for layer in range(layers)]:
            return every
    config.problems.append(
        "layer_types do not repeat one full_attention and then a number of sliding_attention"
    )
    return 1
