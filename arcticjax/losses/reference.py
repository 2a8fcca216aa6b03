"""InfoNCE with the whole score matrix: what `tiled_infonce` must equal, to read and to test."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from arcticjax.losses.labels import Labels, LossSums


def dense_infonce(
    queries_bD: jax.Array,
    documents_TD: jax.Array,
    labels: Labels,
    *,
    temperature: float | jax.Array,
) -> LossSums:
    """The sums of `tiled_infonce`, differentiated by JAX; holds b * T numbers several times."""
    cosines_bT = jnp.matmul(
        queries_bD,
        documents_TD.T,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    temperature = jnp.asarray(temperature, jnp.float32)
    positives_bP, row_groups_b, column_groups_T = labels
    columns_T = jnp.arange(documents_TD.shape[0], dtype=jnp.int32)

    is_positive_bT = jnp.any(positives_bP[:, :, None] == columns_T[None, None, :], axis=1)
    is_negative_bT = (
        (column_groups_T >= 0)[None, :]
        & (column_groups_T[None, :] != row_groups_b[:, None])
        & ~is_positive_bT
    )
    valid_bP = (positives_bP >= 0) & (row_groups_b >= 0)[:, None]
    contested_b = jnp.any(is_negative_bT, axis=1)

    # A row without negatives keeps all columns here (a logsumexp of nothing has no gradient) and
    # is dropped below.
    kept_bT = is_negative_bT | ~contested_b[:, None]
    scores_bT = cosines_bT / temperature
    negatives_b = jax.nn.logsumexp(jnp.where(kept_bT, scores_bT, -jnp.inf), axis=1)
    positive_bP = jnp.take_along_axis(scores_bT, jnp.maximum(positives_bP, 0), axis=1)
    term_bP = jax.nn.softplus(negatives_b[:, None] - positive_bP)

    cosines_bT = jax.lax.stop_gradient(cosines_bT)
    positive_cosine_bP = jnp.take_along_axis(cosines_bT, jnp.maximum(positives_bP, 0), axis=1)
    hardest_b = jnp.max(jnp.where(is_negative_bT, cosines_bT, -jnp.inf), axis=1)
    hardest_bP = jnp.broadcast_to(hardest_b[:, None], positive_bP.shape)

    def total(values_bP: jax.Array, keep_bP: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(keep_bP, values_bP, 0), dtype=jnp.float32)

    contested_bP = valid_bP & contested_b[:, None]
    return LossSums(
        loss=total(term_bP, contested_bP),
        count=total(jnp.ones_like(positive_bP), valid_bP),
        correct=total((positive_cosine_bP > hardest_bP).astype(jnp.float32), valid_bP),
        positive_score=total(positive_cosine_bP, valid_bP),
        hardest_negative_score=total(hardest_bP, contested_bP),
    )
