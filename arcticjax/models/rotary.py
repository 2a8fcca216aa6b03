"""Rotary positions (Su et al. 2021, arXiv 2104.09864): queries and keys are turned by angles that
grow with a token's position in its text.

Angles reach thousands of radians, so the frequencies are rounded to float32 as PyTorch rounds
them; a difference in their last digit would be seen at the end of a long text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arcticjax.models.spec import Rotary

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


class Rotation(NamedTuple):
    """Cosines and sines of the angles of every token, float32 [R, S, K / 2]."""

    cosines: Array
    sines: Array


def frequencies(rotary: Rotary, head_size: int, lengths: np.ndarray | None = None) -> np.ndarray:
    """Radians a position of each pair of a head's numbers: float32 [K / 2], or [lengths, K / 2] for
    texts of so many tokens.

    Past the trained positions theta grows with the text (dynamic NTK scaling, as in the original
    code of Nomic Embed): theta (f n / t - (f - 1))^(K / (K - 2)) at n tokens.
    """
    theta = np.asarray(rotary.theta, np.float64)
    if lengths is not None and rotary.trained_positions is not None:
        excess = np.maximum(lengths / rotary.trained_positions, 1.0)
        growth = rotary.factor * excess - (rotary.factor - 1)
        theta = theta * growth ** (head_size / (head_size - 2))
    exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    powers = (theta[..., None] ** exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1) / powers / np.float32(rotary.divisor)


def rotation(
    rotary: Rotary, head_size: int, positions_RS: Int[Array, "R S"], longest: int
) -> Rotation:
    """The rotation of every token, from its position in its text (`positions_RS` restarts at 0 in
    every text). longest: tokens of the longest text of the model."""
    trained, row_length = rotary.trained_positions, positions_RS.shape[1]
    longest = min(longest, row_length)
    if trained is None or longest <= trained:
        frequencies_RSK = jnp.asarray(frequencies(rotary, head_size))[None, None]
    else:
        # by the length of the token's own text, whatever shares its row
        table = jnp.asarray(frequencies(rotary, head_size, np.arange(trained, longest + 1)))
        past_RS = jnp.clip(_text_lengths(positions_RS), trained, longest) - trained
        frequencies_RSK = table[past_RS]
    angles_RSK = positions_RS.astype(jnp.float32)[:, :, None] * frequencies_RSK
    return Rotation(jnp.cos(angles_RSK), jnp.sin(angles_RSK))


def rotate(x_RSHK: Float[Array, "R S H K"], rotation: Rotation) -> Float[Array, "R S H K"]:
    """Turns every pair (i, i + K / 2) of a head's numbers, in float32; the dtype stays."""
    cosines, sines = (part[:, :, None] for part in rotation)
    first, second = jnp.split(x_RSHK.astype(jnp.float32), 2, axis=-1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return jnp.concatenate(turned, axis=-1).astype(x_RSHK.dtype)


def _text_lengths(positions_RS: Array) -> Array:
    """Tokens of the text that each token belongs to; 1 at padding, whose positions are all 0."""
    row_length = positions_RS.shape[1]
    goes_on_RS = positions_RS[:, 1:] == positions_RS[:, :-1] + 1
    goes_on_RS = jnp.pad(goes_on_RS, ((0, 0), (0, 1)))
    places_S = jnp.arange(row_length, dtype=jnp.int32)[None]
    ends_RS = jax.lax.cummin(jnp.where(goes_on_RS, row_length, places_S), axis=1, reverse=True)
    return jnp.take_along_axis(positions_RS, ends_RS, axis=1) + 1
