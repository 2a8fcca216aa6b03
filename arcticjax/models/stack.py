"""What all families are: something enters the first of many layers that are alike, and leaves the
last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

# What every layer reads beside its input and its parameters; and what each has of its own.
Shared = Any
Own = tuple[Any, ...]


class Stack(nnx.Module):
    """An encoder in three parts, so that a training step can keep what each layer needs apart.

    embeddings: from tokens and positions to float32 [R, S, D]; layers: every parameter has the
    layer as axis 0. One layer is called (states [R, S, D], shared, own, dtype=, attention=) and
    gives states; dtype: of matmuls, attention: its implementation.
    """

    embeddings: Any
    layers: Any

    def enter(
        self,
        tokens_RS: Int[Array, "R S"],
        positions_RS: Int[Array, "R S"],
        dtype: jax.typing.DTypeLike,
    ) -> Float[Array, "R S D"]:
        """What the first layer reads."""
        return self.embeddings(tokens_RS, positions_RS).astype(dtype)

    def shared(self, segments_RS: Int[Array, "R S"], positions_RS: Int[Array, "R S"]) -> Shared:
        """Arrays that all layers read."""
        del positions_RS
        return segments_RS

    def own(self, row_length: int) -> Own:
        """Arrays of which a layer reads its element of axis 0."""
        del row_length
        return ()

    def leave(
        self, x_RSD: Float[Array, "R S D"], dtype: jax.typing.DTypeLike
    ) -> Float[Array, "R S D"]:
        """The last hidden states, in `dtype`."""
        del dtype
        return x_RSD
