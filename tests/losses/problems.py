"""Random problems for the losses and their fp64 solution."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcticjax.losses import Labels, LossSums, dense_infonce, tiled_infonce

NUMBERS = LossSums._fields


def normalise(array):
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def make_labels(positives, row_groups, column_groups):
    return Labels(
        *(jnp.asarray(part, jnp.int32) for part in (positives, row_groups, column_groups))
    )


def diagonal_labels(rows, columns=None):
    return make_labels(np.arange(rows)[:, None], np.arange(rows), np.arange(columns or rows))


def make_problem(seed, rows=24, columns=40, width=16, slots=3, dtype=np.float32):
    """Random texts, and labels with duplicates, empty rows, columns and slots."""
    rng = np.random.default_rng(seed)
    queries = normalise(rng.normal(size=(rows, width)))
    documents = normalise(rng.normal(size=(columns, width)))
    row_groups = rng.integers(0, max(rows // 2, 1), rows)
    column_groups = rng.integers(0, max(rows // 2, 1), columns)
    positives = np.full((rows, slots), -1)
    for row in range(rows):
        chosen = rng.permutation(columns)[: rng.integers(0, min(slots, columns) + 1)]
        positives[row, rng.permutation(slots)[: len(chosen)]] = chosen
    row_groups[rng.random(rows) < 0.15] = -1
    column_groups[rng.random(columns) < 0.15] = -1
    column_groups[positives[positives >= 0]] = np.abs(column_groups[positives[positives >= 0]])
    return (
        jnp.asarray(queries, dtype),
        jnp.asarray(documents, dtype),
        make_labels(positives, row_groups, column_groups),
    )


def reference(
    queries,
    documents,
    labels,
    temperature,
    *,
    sizes=None,
    contrasts=(),
    margin=None,
    guide=None,
    guide_margin=0.0,
    negatives=None,
):
    """Sums and gradients in fp64 NumPy, one softmax per (row, positive).

    negatives: with in-batch negatives off, the positions of each row's own.
    `closest` is how near a cosine comes to a limit above which it is no negative, and
    `temperature_terms` the sum of the sizes of what cancels in the temperature's gradient.
    """
    sizes = sorted(sizes or [(queries.shape[1], 1.0)])
    matrices = [
        tuple(as_float64(part) for part in pair)
        for pair in [(queries, documents), *((one.rows_bD, one.columns_TD) for one in contrasts)]
    ]
    guides = [guide, *(one.guide for one in contrasts)]
    groups = [labels.column_groups_T, *(one.column_groups_T for one in contrasts)]
    cosines = [[cosine_matrix(*pair, size) for pair in matrices] for size, _ in sizes]
    slopes = [[np.zeros_like(matrix) for matrix in of_size] for of_size in cosines]
    whole = cosines[-1][0]
    guided = [
        None if one is None or guide is None else as_float64(one.rows_bG) @ as_float64(one[1]).T
        for one in guides
    ]
    sums = dict.fromkeys(NUMBERS, 0.0)
    temperature_grad, temperature_terms, closest = 0.0, 0.0, np.inf
    for row, mine in enumerate(np.asarray(labels.positives_bP)):
        group, mine = int(labels.row_groups_b[row]), mine[mine >= 0]
        if group < 0 or len(mine) == 0:
            continue
        allowed = [(np.asarray(one) != -1) & (np.asarray(one) != group) for one in groups]
        if negatives is not None:
            own = np.asarray(negatives[row])
            allowed[0] = np.isin(np.arange(len(documents)), own[own >= 0])
        allowed[0][mine] = False
        for number in range(len(matrices)):
            for limit, values in (
                (None if margin is None else min(whole[row, mine]) + margin, cosines[-1][number]),
                (
                    None if guide is None else min(guided[0][row, mine]) + guide_margin,
                    guided[number],
                ),
            ):
                if limit is None or values is None:
                    continue
                gaps = values[row][allowed[number]] - limit
                closest = min([closest, *np.abs(gaps)])
                allowed[number] = allowed[number] & (values[row] <= limit)
        hardest = max(whole[row][allowed[0]], default=-np.inf)
        sums["count"] += len(mine)
        sums["correct"] += sum(whole[row, mine] > hardest)
        sums["positive_score"] += sum(whole[row, mine])
        sums["hardest_negative_score"] += len(mine) * hardest if np.isfinite(hardest) else 0
        for (_, weight), of_size, slopes_of_size in zip(sizes, cosines, slopes, strict=True):
            others = [one[row][kept] for one, kept in zip(of_size, allowed, strict=True)]
            for positive in mine:
                cosine = of_size[0][row, positive]
                # softmax over (positive, negatives) relative to the positive: exact in both tails
                odds = [np.exp((some - cosine) / temperature) for some in others]
                total = sum(some.sum() for some in odds)
                sums["loss"] += weight * np.log1p(total)
                for some, kept, into, theirs in zip(
                    odds, allowed, slopes_of_size, others, strict=True
                ):
                    weights = weight * some / (1 + total)
                    into[row, kept] += weights / temperature
                    slopes_of_size[0][row, positive] -= weights.sum() / temperature
                    temperature_grad -= weights @ (theirs - cosine) / temperature**2
                    temperature_terms += weights @ abs(theirs - cosine) / temperature**2
    gradients = [[np.zeros_like(part) for part in pair] for pair in matrices]
    for (size, _), slopes_of_size, of_size in zip(sizes, slopes, cosines, strict=True):
        for pair, into, slope, cosine in zip(
            matrices, gradients, slopes_of_size, of_size, strict=True
        ):
            add_pullback(into[0], *pair, slope, cosine, size)
            add_pullback(into[1], *pair[::-1], slope.T, cosine.T, size)
    return SimpleNamespace(
        sums=sums,
        gradients=tuple(gradients[0]),
        contrast_gradients=gradients[1:],
        temperature_gradient=temperature_grad,
        temperature_terms=temperature_terms,
        closest=closest,
    )


def as_float64(array):
    return np.asarray(jnp.asarray(array).astype(jnp.float32), np.float64)


def lengths(texts, size):
    """Of the first `size` numbers; 1 where that is the whole text, which is taken as it is, and
    where all are zero."""
    if size == texts.shape[1]:
        return np.ones((len(texts), 1))
    found = np.linalg.norm(texts[:, :size], axis=1, keepdims=True)
    return np.where(found > 0, found, 1)


def cosine_matrix(rows, columns, size):
    return (rows[:, :size] / lengths(rows, size)) @ (columns[:, :size] / lengths(columns, size)).T


def add_pullback(into, texts, others, slopes, cosines, size):
    """Adds the gradient of `texts` through their cosines with `others`."""
    length = lengths(texts, size)
    gradient = slopes @ (others[:, :size] / lengths(others, size))
    if size < texts.shape[1]:
        along = (slopes * cosines).sum(axis=1, keepdims=True)
        gradient -= along * texts[:, :size] / length
    into[:, :size] += gradient / length


@partial(jax.jit, static_argnames=("tile", "row_block"))
def tiled(queries, documents, labels, temperature, tile=7, row_block=5):
    def loss(queries, documents, temperature):
        sums = tiled_infonce(
            queries, documents, labels, temperature=temperature, tile=tile, row_block=row_block
        )
        return sums.loss, sums

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
        queries, documents, temperature
    )


@jax.jit
def dense(queries, documents, labels, temperature):
    def loss(queries, documents, temperature):
        sums = dense_infonce(queries, documents, labels, temperature=temperature)
        return sums.loss, sums

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
        queries, documents, temperature
    )


def error(found, expected):
    """Size of the difference over the size of what is expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)


def assert_equals_reference(result, expected, tolerance=1e-5):
    (_, sums), gradients = result
    for name in NUMBERS:
        assert float(getattr(sums, name)) == pytest.approx(
            expected.sums[name], rel=tolerance, abs=tolerance
        ), name
    for found, wanted in zip(gradients[:2], expected.gradients, strict=True):
        assert error(found.astype(jnp.float32), wanted) <= tolerance
