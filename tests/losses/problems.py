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


def reference(queries, documents, labels, temperature):
    """Sums and gradients in fp64 NumPy, one softmax per (row, positive)."""
    queries, documents = (
        np.asarray(a.astype(jnp.float32), np.float64) for a in (queries, documents)
    )
    positives, row_groups, column_groups = (np.asarray(part) for part in labels)
    sums = dict.fromkeys(NUMBERS, 0.0)
    query_grad, document_grad = np.zeros_like(queries), np.zeros_like(documents)
    temperature_grad = 0.0
    for row, (mine, group) in enumerate(zip(positives, row_groups, strict=True)):
        mine = mine[mine >= 0]
        if group < 0 or len(mine) == 0:
            continue
        allowed = (column_groups != -1) & (column_groups != group)
        allowed[mine] = False
        others = np.flatnonzero(allowed)
        row_cosines = documents @ queries[row]
        for positive in mine:
            cosine, cosines = row_cosines[positive], row_cosines[others]
            # softmax over (positive, negatives) relative to the positive: exact in both tails
            odds = np.exp((cosines - cosine) / temperature)
            weights = odds / (1 + odds.sum())
            sums["loss"] += np.log1p(odds.sum())
            sums["count"] += 1
            sums["correct"] += all(cosines < cosine)
            sums["positive_score"] += cosine
            sums["hardest_negative_score"] += max(cosines, default=0.0)
            slopes = np.zeros(len(documents))
            slopes[others] = weights / temperature
            slopes[positive] = -weights.sum() / temperature
            query_grad[row] += slopes @ documents
            document_grad += np.outer(slopes, queries[row])
            temperature_grad -= weights @ (cosines - cosine) / temperature**2
    return SimpleNamespace(
        sums=sums,
        gradients=(query_grad, document_grad),
        temperature_gradient=temperature_grad,
    )


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
