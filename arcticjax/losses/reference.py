"""InfoNCE with the whole score matrix: what `tiled_infonce` must equal, to read and to test."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from arcticjax.losses.labels import Contrast, Guide, Labels, LossSums


def dense_infonce(
    queries_bD: jax.Array,
    documents_TD: jax.Array,
    labels: Labels,
    *,
    temperature: float | jax.Array,
    sizes: Sequence[tuple[int, float]] | None = None,
    contrasts: Sequence[Contrast] = (),
    margin: float | None = None,
    guide: Guide | None = None,
    guide_margin: float = 0.0,
) -> LossSums:
    """The sums of `tiled_infonce`, differentiated by JAX; holds b * T numbers several times."""
    temperature = jnp.asarray(temperature, jnp.float32)
    positives_bP, row_groups_b, column_groups_T = labels
    columns_T = jnp.arange(documents_TD.shape[0], dtype=jnp.int32)
    is_positive_bT = jnp.any(positives_bP[:, :, None] == columns_T[None, None, :], axis=1)
    valid_bP = (positives_bP >= 0) & (row_groups_b >= 0)[:, None]
    chosen = sorted(sizes or [(queries_bD.shape[1], 1.0)])
    largest = chosen[-1][0]
    all_contrasts = (Contrast(queries_bD, documents_TD, column_groups_T, guide), *contrasts)

    limits_b, guide_limits_b = None, None
    if margin is not None:
        positive_bP = _of_positives(_cosines(queries_bD, documents_TD, largest), positives_bP)
        limits_b = _lowest(jax.lax.stop_gradient(positive_bP), positives_bP) + margin
    if guide is not None:
        guided_bP = _of_positives(_cosines(*guide, guide.rows_bG.shape[1]), positives_bP)
        guide_limits_b = _lowest(guided_bP, positives_bP) + guide_margin

    negative_bC = []
    for contrast in all_contrasts:
        negative_bT = (contrast.column_groups_T >= 0)[None, :] & (
            contrast.column_groups_T[None, :] != row_groups_b[:, None]
        )
        if limits_b is not None:
            cosines_bT = _cosines(contrast.rows_bD, contrast.columns_TD, largest)
            negative_bT &= ~(cosines_bT > limits_b[:, None])
        if contrast.guide is not None and guide_limits_b is not None:
            guided_bT = _cosines(*contrast.guide, contrast.guide.rows_bG.shape[1])
            negative_bT &= ~(guided_bT > guide_limits_b[:, None])
        negative_bC.append(negative_bT)
    negative_bC[0] &= ~is_positive_bT
    is_negative_bC = jnp.concatenate(negative_bC, axis=1)
    contested_b = jnp.any(is_negative_bC, axis=1)
    # A row without negatives keeps all columns here (a logsumexp of nothing has no gradient) and
    # is dropped below.
    kept_bC = is_negative_bC | ~contested_b[:, None]

    def total(values_bP: jax.Array, keep_bP: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(keep_bP, values_bP, 0), dtype=jnp.float32)

    loss = jnp.float32(0)
    for size, weight in chosen:
        cosines_bC = jnp.concatenate(
            [_cosines(one.rows_bD, one.columns_TD, size) for one in all_contrasts], axis=1
        )
        scores_bC = cosines_bC / temperature
        negatives_b = jax.nn.logsumexp(jnp.where(kept_bC, scores_bC, -jnp.inf), axis=1)
        term_bP = jax.nn.softplus(negatives_b[:, None] - _of_positives(scores_bC, positives_bP))
        loss += weight * total(term_bP, valid_bP & contested_b[:, None])

    cosines_bT = jax.lax.stop_gradient(_cosines(queries_bD, documents_TD, largest))
    positive_cosine_bP = _of_positives(cosines_bT, positives_bP)
    hardest_b = jnp.max(jnp.where(negative_bC[0], cosines_bT, -jnp.inf), axis=1)
    hardest_bP = jnp.broadcast_to(hardest_b[:, None], positive_cosine_bP.shape)
    by_documents_bP = valid_bP & jnp.any(negative_bC[0], axis=1)[:, None]
    return LossSums(
        loss=loss,
        count=total(jnp.ones_like(positive_cosine_bP), valid_bP),
        correct=total((positive_cosine_bP > hardest_bP).astype(jnp.float32), valid_bP),
        positive_score=total(positive_cosine_bP, valid_bP),
        hardest_negative_score=total(hardest_bP, by_documents_bP),
    )


def _cosines(rows_bD: jax.Array, columns_TD: jax.Array, size: int) -> jax.Array:
    """Of the first `size` numbers, normalised again where that is not all of them."""
    left, right = rows_bD[:, :size], columns_TD[:, :size]
    if size < rows_bD.shape[1]:
        left, right = (
            (part * jax.lax.rsqrt(jnp.maximum(jnp.sum(part**2, axis=1, keepdims=True), 1e-24)))
            for part in (left.astype(jnp.float32), right.astype(jnp.float32))
        )
    return jnp.matmul(
        left,
        right.T,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _of_positives(values_bC: jax.Array, positives_bP: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values_bC, jnp.maximum(positives_bP, 0), axis=1)


def _lowest(values_bP: jax.Array, positives_bP: jax.Array) -> jax.Array:
    return jnp.min(jnp.where(positives_bP >= 0, values_bP, jnp.inf), axis=1)
