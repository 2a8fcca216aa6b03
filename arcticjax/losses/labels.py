"""What the contrastive loss is told, and what it tells."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Labels(NamedTuple):
    """What is relevant to what, by position in the gathered documents; all int32."""

    positives_bP: jax.Array
    """Column of each positive of a row, each at most once; -1 = none."""
    row_groups_b: jax.Array
    """Rows and columns of one group are never each other's negatives (same document, same query, a
    shared positive, transitively); -1 = an empty row, which contributes nothing."""
    column_groups_T: jax.Array
    """Group of each column; -1 = an empty column, which is never a negative."""


class LossSums(NamedTuple):
    """Sums over the (row, positive) pairs of this device, fp32 scalars: no mean is taken here.

    Only `loss` carries gradient. A row without negatives has loss 0, is `correct`, and adds 0 to
    `hardest_negative_score`.
    """

    loss: jax.Array
    """Nats."""
    count: jax.Array
    """Number of pairs."""
    correct: jax.Array
    """Pairs whose positive scores above every negative of the row."""
    positive_score: jax.Array
    """Cosines of the pairs (before the temperature)."""
    hardest_negative_score: jax.Array
    """Largest cosine of a negative of the row, once per pair."""
