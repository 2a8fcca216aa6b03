"""InfoNCE without in-batch negatives: a query against its own positives and hard negatives.

The definition is that of `infonce` with other columns: one term

    softplus(L_i - s_ip),   L_i = logsumexp of s_ij over the hard negatives j of row i

for each row i and each of its positives p; positives of a row never contend. Positions lead into
the documents of the row's own device, so nothing is gathered between devices and no score beyond
those of a query with its own candidates is computed: b * (P + M) of them.

Differentiated by JAX: in this form, unlike the usual softmax minus one, the positive's weight comes
out as minus the sum of the others to fp32 rounding, also where pairs are well separated
(`infonce`). The gradient of documents is added up by a scatter, whose order of additions, and so
the last digit, a GPU may leave open.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from arcticjax.losses.labels import Contrast, LossSums
from arcticjax.losses.tiles import chosen_sizes, lowest_positive, positive_cosines


def candidate_infonce(
    queries_bD: jax.Array,
    documents_TD: jax.Array,
    positives_bP: jax.Array,
    negatives_bM: jax.Array,
    *,
    temperature: float | jax.Array,
    sizes: Sequence[tuple[int, float]] | None = None,
    margin: float | None = None,
) -> LossSums:
    """InfoNCE sums of this device's queries against their own documents.

    Embeddings are L2-normalised and of one dtype. Positives and negatives are int32 positions in
    `documents_TD`, -1 = none; a row without positives contributes nothing. Any row may name any
    document; one that a row names twice as negative counts once, and one that is also a positive of
    the row is no negative.
    sizes, margin: as in `tiled_infonce`.

    Scores, logsumexp and sums are fp32; fp32 inputs are multiplied at full precision on every
    backend. Gradients flow to both embeddings and to `temperature`, from `loss` alone.

    Raises ValueError when shapes, dtypes or sizes do not fit each other.
    """
    check_candidates(queries_bD, documents_TD, positives_bP, negatives_bM)
    numbers, weights = chosen_sizes(sizes, queries_bD.shape[1])
    # A document that is asked for twice must not get the weight of two.
    same_bMM = negatives_bM[:, :, None] == negatives_bM[:, None, :]
    repeated_bM = jnp.any(jnp.tril(same_bMM, -1), axis=2)
    own_bM = jnp.any(negatives_bM[:, :, None] == positives_bP[:, None, :], axis=2)
    negative_bM = (negatives_bM >= 0) & ~repeated_bM & ~own_bM
    valid_bP = positives_bP >= 0

    cosines_KbP = cosines_at(queries_bD, documents_TD, positives_bP, numbers)
    cosines_KbM = cosines_at(queries_bD, documents_TD, negatives_bM, numbers)
    positive_bP, cosines_bM = jax.lax.stop_gradient((cosines_KbP[-1], cosines_KbM[-1]))
    if margin is not None:
        limits_b = lowest_positive(positive_bP, positives_bP) + margin
        negative_bM &= ~(cosines_bM > limits_b[:, None])  # keeps NaN
    contested_b = jnp.any(negative_bM, axis=1)

    def total(values_bP: jax.Array, keep_bP: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(keep_bP, values_bP, 0), dtype=jnp.float32)

    temperature = jnp.asarray(temperature, jnp.float32)
    negatives_Kb = log_sum_exp(cosines_KbM / temperature, negative_bM)
    term_KbP = jax.nn.softplus(negatives_Kb[:, :, None] - cosines_KbP / temperature)
    weighted_bP = jnp.tensordot(jnp.asarray(weights, jnp.float32), term_KbP, 1)
    hardest_b = jnp.max(jnp.where(negative_bM, cosines_bM, -jnp.inf), axis=1, initial=-jnp.inf)
    hardest_bP = jnp.broadcast_to(hardest_b[:, None], positive_bP.shape)
    contested_bP = valid_bP & contested_b[:, None]
    return LossSums(
        loss=total(weighted_bP, contested_bP),
        count=total(jnp.ones_like(positive_bP), valid_bP),
        correct=total((positive_bP > hardest_bP).astype(jnp.float32), valid_bP),
        positive_score=total(positive_bP, valid_bP),
        hardest_negative_score=total(hardest_bP, contested_bP),
    )


def cosines_at(
    queries_bD: jax.Array, documents_TD: jax.Array, places_bC: jax.Array, sizes: tuple[int, ...]
) -> jax.Array:
    """[sizes, b, C]: cosines of each query with its own documents, by ascending size.

    Of document 0 where there is none (masked by the caller).
    """
    if not places_bC.shape[1]:
        return jnp.zeros((len(sizes), *places_bC.shape), jnp.float32)
    groups_T = jnp.zeros_like(places_bC, shape=documents_TD.shape[:1])  # not looked at
    return positive_cosines(Contrast(queries_bD, documents_TD, groups_T), places_bC, sizes)


def log_sum_exp(scores_xC: jax.Array, keep_bC: jax.Array) -> jax.Array:
    """logsumexp of the kept scores over the last axis; of all of them where a row keeps none,
    since that of nothing has no gradient (such rows are masked by the caller)."""
    some_b = jnp.any(keep_bC, axis=1, keepdims=True)
    kept_xC = jnp.where(keep_bC | ~some_b, scores_xC, -jnp.inf)
    return jax.nn.logsumexp(kept_xC, axis=-1)


def check_candidates(queries_bD: jax.Array, documents_TD: jax.Array, *places_bC: jax.Array) -> None:
    """Raises ValueError when shapes or dtypes do not fit each other."""
    b, width = queries_bD.shape
    shapes_fit = documents_TD.shape[1:] == (width,) and len(documents_TD) > 0
    if not shapes_fit or any(places.ndim != 2 or len(places) != b for places in places_bC):
        raise ValueError(
            f"shapes do not fit: queries {queries_bD.shape}, documents {documents_TD.shape}, "
            f"positions {[places.shape for places in places_bC]}"
        )
    if queries_bD.dtype != documents_TD.dtype:
        raise ValueError(
            f"embeddings are {queries_bD.dtype} and {documents_TD.dtype}: cast one to the other"
        )
