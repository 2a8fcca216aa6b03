"""InfoNCE, dense and tiled, against an fp64 reference, published values and each other."""

from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcticjax.losses import LossSums, dense_infonce, tiled_infonce
from tests.losses.problems import (
    NUMBERS,
    assert_equals_reference,
    dense,
    diagonal_labels,
    error,
    make_labels,
    make_problem,
    normalise,
    reference,
    tiled,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")

BOTH = pytest.mark.parametrize("function", [dense, tiled], ids=["dense", "tiled"])


# Published values: the public unit tests of the reference trainer.

QUERIES = jnp.array([[1.0, 2, 3], [1, 3, 2], [2, 1, 3], [2, 3, 1]])
DOCUMENTS = jnp.array(
    [[1.1, 2.1, 3.1], [1.1, 3.1, 2.1], [2.1, 1.1, 3.1], [2.1, 3.1, 1.1], [2.2, 3.2, 1.2]]
)


@pytest.mark.parametrize(
    "function",
    [dense_infonce, partial(tiled_infonce, tile=2)],
    ids=["dense", "tiled"],
)
@pytest.mark.parametrize(
    ("second", "temperature", "loss", "gradient"),
    [(-1, 0.1, 0.8396385675, 0.2048036754), (4, 1.0, 1.3996896535, 0.0495789051)],
    ids=["one positive", "two positives"],
)
def test_published_values(function, second, temperature, loss, gradient):
    positives = np.array([[0, -1], [1, -1], [2, -1], [3, second]])
    labels = make_labels(positives, np.arange(4), [0, 1, 2, 3, 4 if second < 0 else 3])

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def mean(queries):
        """Over (query, positive) pairs; the published gradient goes through the normalisation."""
        queries, documents = (
            texts / jnp.linalg.norm(texts, axis=1, keepdims=True) for texts in (queries, DOCUMENTS)
        )
        sums = function(queries, documents, labels, temperature=temperature)
        return sums.loss / sums.count, sums.count

    (value, count), gradients = mean(QUERIES)
    assert float(count) == (4 if second < 0 else 5)
    assert float(value) == pytest.approx(loss, abs=2e-7)
    assert float(gradients.sum()) == pytest.approx(gradient, abs=2e-7)


# The fp64 reference.


def test_the_reference_gradient_is_a_difference_quotient():
    queries, documents, labels = make_problem(3, rows=6, columns=9, width=4)
    expected = reference(queries, documents, labels, 0.3)
    step = 2.0**-10
    for argument, shape in enumerate((queries.shape, documents.shape)):
        for place in [(0, 0), (3, 2), (5, 3)]:
            unit = np.zeros(shape, np.float32)
            unit[place] = step
            moved = [[queries, documents], [queries, documents]]
            moved[0][argument] = moved[0][argument] + unit
            moved[1][argument] = moved[1][argument] - unit
            up, down = (reference(*pair, labels, 0.3).sums["loss"] for pair in moved)
            quotient = (up - down) / (2 * step)
            assert quotient == pytest.approx(
                expected.gradients[argument][place], rel=1e-3, abs=1e-4
            )


@BOTH
@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_everything_at_once_equals_the_reference(function, temperature):
    problem = make_problem(1)
    expected = reference(*problem, temperature)
    assert 0 < expected.sums["correct"] < expected.sums["count"]
    assert_equals_reference(function(*problem, temperature), expected)


@pytest.mark.parametrize("strength", [0.2, 0.64], ids=["ordinary", "saturated"])
def test_gradient_accuracy(strength):
    """Half the usual fp32 forms are 51 % wrong at a loss of 1e-6."""
    rng = np.random.default_rng(0)
    queries = normalise(rng.normal(size=(512, 384)))
    noise = normalise(rng.normal(size=(512, 384)))
    documents = normalise(strength * queries + np.sqrt(1 - strength**2) * noise)
    # What all texts share raises every cosine, as in real embeddings.
    shared = normalise(rng.normal(size=(1, 384)))
    queries, documents = (
        jnp.asarray(normalise(part + 0.6 * shared), jnp.float32) for part in (queries, documents)
    )
    labels = diagonal_labels(512)
    expected = reference(queries, documents, labels, 0.02)
    loss = expected.sums["loss"] / 512
    assert (1e-7 < loss < 1e-5) if strength > 0.5 else (0.1 < loss < 10)
    (value, _), gradients = tiled(queries, documents, labels, 0.02, tile=200, row_block=None)
    assert float(value) == pytest.approx(expected.sums["loss"], rel=1e-5)
    for found, wanted in zip(gradients, expected.gradients, strict=False):
        assert error(found, wanted) <= 1e-5


@BOTH
def test_temperature_gradient(function):
    problem = make_problem(2)
    (_, _), gradients = function(*problem, 0.05)
    assert float(gradients[2]) == pytest.approx(
        reference(*problem, 0.05).temperature_gradient, rel=1e-5
    )


def test_bfloat16_scores_are_float32():
    problem = make_problem(4, rows=48, columns=48, width=64, dtype=jnp.bfloat16)
    expected = reference(*problem, 0.1)
    (_, sums), gradients = tiled(*problem, 0.1)
    assert all(number.dtype == jnp.float32 for number in sums)
    for name in NUMBERS:
        assert float(getattr(sums, name)) == pytest.approx(expected.sums[name], rel=1e-5), name
    for found, wanted in zip(gradients, expected.gradients, strict=False):
        assert found.dtype == jnp.bfloat16
        # Weights and results are rounded to 8 bits.
        assert error(found.astype(jnp.float32), wanted) <= 6e-3


# Tiles.


@pytest.mark.parametrize(
    ("tile", "row_block"), [(1, 24), (8, None), (39, 1), (17, 23), (1000, 100)]
)
def test_any_tile_and_row_block(tile, row_block):
    problem = make_problem(5)
    assert_equals_reference(
        tiled(*problem, 0.1, tile=tile, row_block=row_block), reference(*problem, 0.1)
    )


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(4, 3, 8, 2, 2, 3), (9, 17, 4, 3, 7, 5)]),
    temperature=st.floats(0.02, 2.0),
)
def test_tiled_equals_dense(seed, shape, temperature):
    rows, columns, width, slots, tile, row_block = shape
    problem = make_problem(seed, rows, columns, width, slots)
    (_, sums), gradients = tiled(*problem, temperature, tile=tile, row_block=row_block)
    (_, dense_sums), dense_gradients = dense(*problem, temperature)
    for name in NUMBERS:
        found, wanted = float(getattr(sums, name)), float(getattr(dense_sums, name))
        assert found == pytest.approx(wanted, rel=2e-5, abs=2e-5), name
    for found, wanted in zip(gradients[:2], dense_gradients, strict=False):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=2e-5 / temperature)


# Labels.


@BOTH
def test_positives_of_a_row_never_contend(function):
    """Two positives and no negative teach nothing; a third text makes two terms."""
    rng = np.random.default_rng(0)
    queries, documents = (
        jnp.asarray(normalise(rng.normal(size=s)), jnp.float32) for s in [(1, 4), (3, 4)]
    )
    alone = make_labels(
        [[0, 1]], [0], [7, 8, -1]
    )  # other groups: their column numbers must suffice
    (_, sums), gradients = function(queries, documents, alone, 0.1)
    assert (float(sums.loss), float(sums.count), float(sums.correct)) == (0, 2, 2)
    assert not any(np.any(gradient) for gradient in gradients)
    contested = make_labels([[0, 1]], [0], [7, 8, 9])
    assert_equals_reference(
        function(queries, documents, contested, 0.1),
        reference(queries, documents, contested, 0.1),
    )


@BOTH
def test_a_group_has_no_negatives_within(function):
    """Rows 0 and 2 ask for one document in two columns; neither is a negative of them."""
    rng = np.random.default_rng(1)
    queries, documents = (
        jnp.asarray(normalise(rng.normal(size=(4, 8))), jnp.float32) for _ in range(2)
    )
    documents = documents.at[2].set(documents[0])
    groups = [0, 1, 0, 3]
    labels = make_labels(np.arange(4)[:, None], groups, groups)
    result = function(queries, documents, labels, 0.1)
    assert_equals_reference(result, reference(queries, documents, labels, 0.1))
    (_, sums), gradients = result
    assert error(sums.loss, function(queries, documents, diagonal_labels(4), 0.1)[0][0]) > 1e-3
    # Document 2 moves row 0 not at all: its gradient is made of rows 1, 2 and 3 alone.
    without = make_labels(np.arange(4)[:, None], [-1, 1, 0, 3], groups)
    np.testing.assert_allclose(
        gradients[1][2], function(queries, documents, without, 0.1)[1][1][2], rtol=1e-6
    )


@BOTH
def test_empty_rows_columns_and_slots_change_nothing(function):
    queries, documents, labels = make_problem(6, rows=5, columns=6)
    positives = np.pad(labels.positives_bP, [(0, 3), (0, 1)], constant_values=-1)
    positives[6, 0] = 1  # an empty row may even name one
    padded_labels = make_labels(
        positives,
        np.pad(labels.row_groups_b, (0, 3), constant_values=-1),
        np.pad(labels.column_groups_T, (0, 4), constant_values=-1),
    )
    padded = np.pad(queries, [(0, 3), (0, 0)]), np.pad(documents, [(0, 4), (0, 0)])
    (_, sums), gradients = function(queries, documents, labels, 0.1)
    (_, padded_sums), padded_gradients = function(*padded, padded_labels, 0.1)
    assert sums.count > 0
    for name in NUMBERS:
        assert float(getattr(padded_sums, name)) == pytest.approx(
            float(getattr(sums, name)), rel=1e-5
        )
    for found, wanted in zip(padded_gradients[:2], gradients, strict=False):
        np.testing.assert_allclose(found[: len(wanted)], wanted, rtol=1e-4, atol=1e-6)
        assert not np.any(found[len(wanted) :])


@BOTH
def test_a_batch_of_padding_is_zero(function):
    labels = make_labels(np.full((6, 2), -1), np.full(6, -1), np.full(10, -1))
    (_, sums), gradients = function(jnp.zeros((6, 4)), jnp.zeros((10, 4)), labels, 0.02)
    assert all(float(number) == 0 for number in sums)
    assert not any(np.any(gradient) for gradient in gradients)


@BOTH
def test_a_row_without_negatives_is_zero(function):
    labels = make_labels([[0], [1]], [3, 3], [3, 3])
    (_, sums), gradients = function(jnp.eye(2, 4), jnp.eye(2, 4), labels, 0.02)
    assert sums == LossSums(loss=0, count=2, correct=2, positive_score=2, hardest_negative_score=0)
    assert not any(np.any(gradient) for gradient in gradients)


@BOTH
@pytest.mark.parametrize("side", [0, 1])
def test_nan_reaches_the_loss(function, side):
    queries, documents, labels = *(jnp.eye(4, 8) for _ in range(2)), diagonal_labels(4)
    inputs = [queries, documents]
    inputs[side] = inputs[side].at[1].set(jnp.nan)
    assert np.isnan(function(*inputs, labels, 0.1)[0][0])


@pytest.mark.parametrize("function", [dense_infonce, partial(tiled_infonce, tile=8)])
def test_only_the_loss_has_a_gradient(function):
    @jax.jit
    @jax.grad
    def gradient(queries):
        sums = function(queries, documents, labels, temperature=0.1)
        return sums.correct + sums.positive_score - 3 * sums.hardest_negative_score

    queries, documents, labels = make_problem(7)
    assert not np.any(gradient(queries))


def test_strict_promotion_and_ranks():
    queries, documents, labels = make_problem(8)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.jit(
            jax.grad(
                lambda queries: (
                    tiled_infonce(
                        queries, documents, labels, temperature=0.1, tile=16, row_block=7
                    ).loss
                )
            )
        )(queries)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, d, labels: (q, d[:, :-1], labels), "shapes"),
        (lambda q, d, labels: (q[:-1], d, labels), "shapes"),
        (lambda q, d, labels: (q, d[:-1], labels), "shapes"),
        (lambda q, d, labels: (q, d.astype(jnp.bfloat16), labels), "bfloat16"),
    ],
)
def test_inputs_that_do_not_fit(change, words):
    with pytest.raises(ValueError, match=words):
        tiled_infonce(*change(*make_problem(0)), temperature=0.1, tile=8)
