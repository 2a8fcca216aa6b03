"""From the table of texts in a row to what every token of the row needs to know."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int


def segments_and_positions(
    starts_RK: Int[Array, "R K"], lengths_RK: Int[Array, "R K"], row_length: int
) -> tuple[Int[Array, "R S"], Int[Array, "R S"]]:
    """Segment ids (0 = padding, k + 1 = the text of slot k) and positions that restart at 0 in
    every text, both int32 and `row_length` wide. Texts of a row must not overlap; an empty slot has
    length 0."""
    inside_RKS = slot_mask(starts_RK, lengths_RK, row_length)
    slots_K = jnp.arange(1, starts_RK.shape[1] + 1, dtype=jnp.int32)
    places_S = jnp.arange(row_length, dtype=jnp.int32)
    offsets_RKS = places_S[None, None, :] - starts_RK[:, :, None]
    segments_RS = jnp.where(inside_RKS, slots_K[None, :, None], 0).sum(1, dtype=jnp.int32)
    positions_RS = jnp.where(inside_RKS, offsets_RKS, 0).sum(1, dtype=jnp.int32)
    return segments_RS, positions_RS


def slot_mask(
    starts_RK: Int[Array, "R K"], lengths_RK: Int[Array, "R K"], row_length: int
) -> Bool[Array, "R K S"]:
    """True where place s of the row belongs to the text of slot k."""
    places_S = jnp.arange(row_length, dtype=jnp.int32)
    offsets_RKS = places_S[None, None, :] - starts_RK[:, :, None]
    return (offsets_RKS >= 0) & (offsets_RKS < lengths_RK[:, :, None])
