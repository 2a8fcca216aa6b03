"""NomicBERT and GTE: BERT's post-norm layers with rotary positions and a gated perceptron.

NomicBERT has no biases beside those of its norms and gates by SiLU; GTE has biases but at the gate,
which is a GELU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from flax import nnx

from arcticjax.models.activations import gelu
from arcticjax.models.attention import Implementation
from arcticjax.models.layers import Attention, GatedMlp, LayerNorm, look_up, normal
from arcticjax.models.rotary import rotation
from arcticjax.models.spec import ModelSpec
from arcticjax.models.stack import Own, Shared, Stack

if TYPE_CHECKING:
    from jaxtyping import Array


class Embeddings(nnx.Module):
    """The sum of token and type-0 vectors (GTE may have no types), normalised."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        deviation, width = spec.initializer_range, spec.hidden_size
        types = (spec.type_vocab_size, width)
        self.token = nnx.Param(normal(rngs, (spec.vocab_size, width), deviation))
        self.type = nnx.Param(normal(rngs, types, deviation)) if spec.type_vocab_size else None
        self.norm = LayerNorm(width, spec.layer_norm_epsilon)

    def __call__(self, tokens_RS: Array, positions_RS: Array) -> Array:
        del positions_RS  # they enter in attention
        x_RSD = look_up(self.token[...], tokens_RS)
        return self.norm(x_RSD if self.type is None else x_RSD + self.type[...][0])


class Layer(nnx.Module):
    """Self-attention, then the perceptron; each is added to its input and the sum normalised."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        nomic = spec.family == "nomic_bert"
        self.attention = Attention(spec, rngs, bias=not nomic)
        self.mlp = GatedMlp(spec, rngs, jax.nn.silu if nomic else gelu, down_bias=not nomic)

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
        segments_RS, turns = shared
        attended = self.attention(x_RSD, segments_RS, attention, turns)
        x_RSD = self.attention.norm(x_RSD, attended, dtype=dtype)
        return self.mlp.norm(x_RSD, self.mlp(x_RSD), dtype=dtype)


class RotaryBert(Stack):
    """The whole encoder without pooler."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        self.embeddings = Embeddings(spec, rngs)
        self.layers = nnx.vmap(lambda layer_rngs: Layer(spec, layer_rngs))(
            rngs.split(spec.num_layers)
        )
        self.spec = spec

    def shared(self, segments_RS: Array, positions_RS: Array) -> Shared:
        """Segments, and how far each position turns."""
        spec = self.spec
        assert spec.rotary is not None
        return segments_RS, rotation(spec.rotary, spec.head_size, positions_RS, spec.max_positions)
