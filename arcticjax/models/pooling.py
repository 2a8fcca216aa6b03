"""From the hidden states of a packed row to one vector per text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from arcticjax.errors import ConfigError
from arcticjax.models.packing import slot_mask
from arcticjax.models.spec import POOLINGS, Pooling

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def pool(
    hidden_RSD: Float[Array, "R S D"],
    starts_RK: Int[Array, "R K"],
    lengths_RK: Int[Array, "R K"],
    kind: Pooling,
) -> Float[Array, "R K D"]:
    """The vector of every text in float32: its first state (`cls`), its last (`last`) or the mean
    of its states (`mean`).

    Slots of length 0 give zeros and pass no gradient. Raises ConfigError for another kind."""
    row_length = hidden_RSD.shape[1]
    if kind == "mean":
        weights_RKS = slot_mask(starts_RK, lengths_RK, row_length).astype(jnp.float32)
        weights_RKS = weights_RKS / jnp.maximum(lengths_RK, 1).astype(jnp.float32)[:, :, None]
        return jnp.einsum(
            "RKS,RSD->RKD",
            weights_RKS,
            hidden_RSD.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
    if kind == "cls":
        places_RK = starts_RK
    elif kind == "last":
        places_RK = starts_RK + lengths_RK - 1
    else:
        raise ConfigError(f"pooling is {kind!r}, known are {', '.join(POOLINGS)}")
    # empty slots point past the end
    places_RK = jnp.clip(places_RK, 0, row_length - 1)
    picked_RKD = jnp.take_along_axis(hidden_RSD, places_RK[:, :, None], axis=1)
    return jnp.where((lengths_RK > 0)[:, :, None], picked_RKD.astype(jnp.float32), 0.0)


def normalize(vectors_RKD: Float[Array, "R K D"]) -> Float[Array, "R K D"]:
    """Each vector divided by its length, in float32; a zero vector stays zero, with a finite
    gradient."""
    vectors_RKD = vectors_RKD.astype(jnp.float32)
    squares_RK1 = jnp.sum(vectors_RKD * vectors_RKD, axis=-1, keepdims=True)
    # the inner `where` keeps the branch that is not taken finite in the backward pass
    scale_RK1 = jax.lax.rsqrt(jnp.where(squares_RK1 > 0, squares_RK1, 1.0))
    return vectors_RKD * scale_RK1
