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


class Guide(NamedTuple):
    """Embeddings of the same texts by another model, L2-normalised: a column that it finds nearer
    to a row than the row's positive is no negative (GISTEmbed, arXiv 2402.16829)."""

    rows_bG: jax.Array
    columns_TG: jax.Array


class Contrast(NamedTuple):
    """A further matrix of scores whose entries are negatives of the same rows.

    Row i of `rows_bD` stands for row i of the batch: its query again, or its document. Columns of
    the row's own group are left out, so a text never meets itself.
    """

    rows_bD: jax.Array
    columns_TD: jax.Array
    column_groups_T: jax.Array
    guide: Guide | None = None


class LossSums(NamedTuple):
    """Sums over the (row, positive) pairs of this device, fp32 scalars: no mean is taken here.

    Only `loss` carries gradient. A row without negatives has loss 0, is `correct`, and adds 0 to
    `hardest_negative_score`. The others speak of whole embeddings, queries against documents.
    """

    loss: jax.Array
    """Nats; with several Matryoshka sizes the weighted sum over them."""
    count: jax.Array
    """Number of pairs."""
    correct: jax.Array
    """Pairs whose positive scores above every negative of the row."""
    positive_score: jax.Array
    """Cosines of the pairs (before the temperature)."""
    hardest_negative_score: jax.Array
    """Largest cosine of a negative of the row, once per pair."""


class DistillationSums(NamedTuple):
    """Sums over this device, fp32 scalars; a mean is the ratio of both, summed over devices."""

    loss: jax.Array
    count: jax.Array
    """What the loss is a mean over: queries, or pairs of a positive and a negative."""
