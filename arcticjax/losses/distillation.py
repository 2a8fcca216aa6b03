"""Losses that teach a query's ranking of its own documents by a teacher's scores.

Positions lead into the documents of the row's own device, or into gathered ones, as for
`candidates`: -1 = none. Student scores are cosine / temperature, in fp32. The teacher gets no
gradient, and its scores where there is no document are not looked at. Sums are of this device: the
mean over several is `psum(loss) / psum(count)`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from arcticjax.losses.candidates import check_candidates, cosines_at, log_sum_exp
from arcticjax.losses.labels import DistillationSums


def kl_divergence(
    queries_bD: jax.Array,
    documents_TD: jax.Array,
    candidates_bC: jax.Array,
    teacher_bC: jax.Array,
    *,
    temperature: float | jax.Array,
    teacher_temperature: float,
) -> DistillationSums:
    """KL(teacher || student), in nats, of the softmax over each query's candidates.

    candidates_bC: positives and negatives alike, each document at most once in a row.
    teacher_bC: the teacher's scores of the candidates; its softmax is that of score /
        teacher_temperature.
    A query with at least one candidate counts as one; with one only its loss is 0.

    Source: softened targets, Hinton et al. 2015 (arXiv 1503.02531, section 2, here without the
    factor temperature^2: the two temperatures need not be equal); over the candidates of a query as
    in RocketQAv2, Ren et al. 2021 (arXiv 2110.07367).

    Raises ValueError when shapes or dtypes do not fit each other.
    """
    check_candidates(queries_bD, documents_TD, candidates_bC)
    _check_teacher(teacher_bC, candidates_bC.shape)
    (cosines_bC,) = cosines_at(queries_bD, documents_TD, candidates_bC, queries_bD.shape[1:])
    valid_bC = candidates_bC >= 0
    scores_bC = cosines_bC / jnp.asarray(temperature, jnp.float32)
    teacher_bC = jax.lax.stop_gradient(jnp.where(valid_bC, teacher_bC, 0).astype(jnp.float32))
    target_bC = _log_softmax(teacher_bC / teacher_temperature, valid_bC)
    ranked_bC = valid_bC & (jnp.sum(valid_bC, axis=1, keepdims=True) > 1)
    # Masked before it meets the student: its gradient must not become 0 times infinity.
    probability_bC = jnp.where(ranked_bC, jnp.exp(target_bC), 0)
    term_bC = probability_bC * (target_bC - _log_softmax(scores_bC, valid_bC))
    return DistillationSums(
        loss=jnp.sum(term_bC, dtype=jnp.float32),
        count=jnp.sum(jnp.any(valid_bC, axis=1), dtype=jnp.float32),
    )


def margin_mse(
    queries_bD: jax.Array,
    documents_TD: jax.Array,
    positives_bP: jax.Array,
    negatives_bM: jax.Array,
    teacher_bC: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
) -> DistillationSums:
    """Squared error of the student's margins, s_positive - s_negative, against the teacher's.

    Every positive of a row makes a pair with every negative of it, and each pair counts as one.
    teacher_bC: the teacher's scores, C = P + M: first of the positives, then of the negatives. They
        are taken as they are: the temperature brings the student's cosines to their scale.

    Source: MarginMSE, Hofstätter et al. 2020 (arXiv 2010.02666).

    Raises ValueError when shapes or dtypes do not fit each other.
    """
    check_candidates(queries_bD, documents_TD, positives_bP, negatives_bM)
    candidates_bC = jnp.concatenate([positives_bP, negatives_bM], axis=1)
    _check_teacher(teacher_bC, candidates_bC.shape)
    (cosines_bC,) = cosines_at(queries_bD, documents_TD, candidates_bC, queries_bD.shape[1:])
    scores_bC = cosines_bC / jnp.asarray(temperature, jnp.float32)
    # Not multiplied by 0 or subtracted where there is none: what stands there may be NaN.
    teacher_bC = jnp.where(candidates_bC >= 0, teacher_bC, 0).astype(jnp.float32)
    off_bC = scores_bC - jax.lax.stop_gradient(teacher_bC)
    slots = positives_bP.shape[1]
    error_bPM = off_bC[:, :slots, None] - off_bC[:, None, slots:]
    pair_bPM = (positives_bP >= 0)[:, :, None] & (negatives_bM >= 0)[:, None, :]
    return DistillationSums(
        loss=jnp.sum(jnp.where(pair_bPM, error_bPM**2, 0), dtype=jnp.float32),
        count=jnp.sum(pair_bPM, dtype=jnp.float32),
    )


def _log_softmax(scores_bC: jax.Array, valid_bC: jax.Array) -> jax.Array:
    """log softmax over the valid places, by differences from the largest score.

    With x = score - largest, log softmax is x - softplus(l), l the logsumexp of x over all but the
    largest: accurate where one takes nearly all, and its gradient there is minus the sum of the
    others' (see `infonce`). Rows of fewer than two valid places are masked by the caller.
    """
    places_C = jnp.arange(scores_bC.shape[1])
    top_b = jnp.argmax(jnp.where(valid_bC, scores_bC, -jnp.inf), axis=1)
    is_top_bC = top_b[:, None] == places_C
    relative_bC = scores_bC - jnp.take_along_axis(scores_bC, top_b[:, None], axis=1)
    relative_bC = jnp.where(is_top_bC, 0, relative_bC)
    rest_b = log_sum_exp(relative_bC, valid_bC & ~is_top_bC)
    return relative_bC - jax.nn.softplus(rest_b)[:, None]


def _check_teacher(teacher_bC: jax.Array, shape: tuple[int, ...]) -> None:
    if teacher_bC.shape != shape:
        raise ValueError(f"shapes do not fit: teacher {teacher_bC.shape}, candidates {shape}")
