"""InfoNCE over a query's own candidates, against an fp64 reference and published values."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcticjax.losses import LossSums, candidate_infonce
from tests.losses.problems import (
    NUMBERS,
    assert_equals_reference,
    error,
    make_labels,
    normalise,
    reference,
)

SIZES = ((16, 0.5), (5, 0.3))


def make_problem(seed, rows=20, columns=48, width=16, slots=3, negatives=5):
    """Texts that share a direction, rows with none to `slots` positives and any negatives: named
    twice, also a positive of the row, a positive of another row, none."""
    rng = np.random.default_rng(seed)
    queries, documents = (
        jnp.asarray(normalise(rng.normal(size=(count, width)) + 0.3), jnp.float32)
        for count in (rows, columns)
    )
    positives = np.full((rows, slots), -1)
    for row in range(rows):
        chosen = rng.permutation(columns)[: rng.integers(0, slots + 1)]
        positives[row, rng.permutation(slots)[: len(chosen)]] = chosen
    hard = rng.integers(-1, columns, (rows, negatives))
    hard[0], positives[0, 0] = -1, 7  # a positive without negatives
    hard[1, :3], positives[1] = 9, [3, 4, -1]  # one negative, three times
    hard[2, :2], positives[2] = [5, 6], [5, -1, 8]  # one of them a positive
    return queries, documents, positives.astype(np.int32), hard.astype(np.int32)


def expected(queries, documents, positives, negatives, temperature, **options):
    labels = make_labels(positives, np.zeros(len(queries)), np.zeros(len(documents)))
    return reference(queries, documents, labels, temperature, negatives=negatives, **options)


@partial(jax.jit, static_argnames=("sizes", "margin"))
def candidates(queries, documents, positives, negatives, temperature, sizes=None, margin=None):
    def loss(queries, documents, temperature):
        sums = candidate_infonce(
            queries,
            documents,
            positives,
            negatives,
            temperature=temperature,
            sizes=sizes,
            margin=margin,
        )
        return sums.loss, sums

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
        queries, documents, temperature
    )


@pytest.mark.parametrize(
    "options", [{}, {"sizes": SIZES}, {"margin": 0.05}, {"margin": 0.2, "sizes": SIZES}], ids=str
)
def test_everything_at_once_equals_the_reference(options):
    problem = make_problem(0)
    for temperature in (0.05, 1.0):
        wanted = expected(*problem, temperature, **options)
        assert 0 < wanted.sums["correct"] < wanted.sums["count"]
        assert wanted.closest > 1e-4
        result = candidates(*problem, temperature, **options)
        assert_equals_reference(result, wanted)
        assert float(result[1][2]) == pytest.approx(wanted.temperature_gradient, rel=1e-5)


def test_the_options_change_the_loss():
    problem = make_problem(0)
    plain, *others = (
        expected(*problem, 0.1, **options).sums["loss"]
        for options in ({}, {"sizes": SIZES}, {"margin": 0.05})
    )
    assert all(abs(other - plain) > 0.02 * plain for other in others)


@pytest.mark.parametrize(
    ("second", "temperature", "loss", "gradient"),
    [(-1, 0.1, 0.8396385675, 0.2048036754), (4, 1.0, 1.3996896535, 0.0495789051)],
    ids=["one positive", "two positives"],
)
def test_published_values(second, temperature, loss, gradient):
    """The reference trainer's unit tests, all others being named as negatives."""
    queries = jnp.array([[1.0, 2, 3], [1, 3, 2], [2, 1, 3], [2, 3, 1]])
    documents = jnp.array(
        [[1.1, 2.1, 3.1], [1.1, 3.1, 2.1], [2.1, 1.1, 3.1], [2.1, 3.1, 1.1], [2.2, 3.2, 1.2]]
    )
    positives = np.array([[0, -1], [1, -1], [2, -1], [3, second]], np.int32)
    negatives = np.tile(np.arange(5, dtype=np.int32), (4, 1))  # positives are no negatives

    @jax.jit
    @jax.value_and_grad
    def mean(queries):
        queries, texts = (
            part / jnp.linalg.norm(part, axis=1, keepdims=True) for part in (queries, documents)
        )
        sums = candidate_infonce(queries, texts, positives, negatives, temperature=temperature)
        return sums.loss / sums.count

    value, gradients = mean(queries)
    assert float(value) == pytest.approx(loss, abs=2e-7)
    assert float(gradients.sum()) == pytest.approx(gradient, abs=2e-7)


@pytest.mark.parametrize("strength", [0.3, 0.7], ids=["ordinary", "saturated"])
def test_gradient_accuracy(strength):
    rng = np.random.default_rng(0)
    queries = normalise(rng.normal(size=(128, 384)))
    noise = normalise(rng.normal(size=(512, 384)))
    documents = 0.2 * np.tile(queries, (4, 1)) + noise
    documents[:128] = strength * queries + np.sqrt(1 - strength**2) * noise[:128]
    shared = normalise(rng.normal(size=(1, 384)))
    queries, documents = (
        jnp.asarray(normalise(normalise(part) + 0.6 * shared), jnp.float32)
        for part in (queries, documents)
    )
    positives = np.arange(128, dtype=np.int32)[:, None]
    negatives = positives + np.arange(128, 512, 128, dtype=np.int32)[None]
    wanted = expected(queries, documents, positives, negatives, 0.02)
    loss = wanted.sums["loss"] / 128
    assert (1e-8 < loss < 1e-5) if strength > 0.5 else (0.01 < loss < 10)
    (value, _), gradients = candidates(queries, documents, positives, negatives, 0.02)
    assert float(value) == pytest.approx(wanted.sums["loss"], rel=1e-5)
    for found, one in zip(gradients[:2], wanted.gradients, strict=True):
        assert error(found, one) <= 1e-5


def test_padding_and_order_change_nothing():
    queries, documents, positives, negatives = make_problem(1)
    (_, sums), gradients = candidates(queries, documents, positives, negatives, 0.1)
    rng = np.random.default_rng(0)
    more = {"constant_values": -1}
    padded = (
        jnp.pad(queries, [(0, 3), (0, 0)]),
        jnp.pad(documents, [(0, 2), (0, 0)]),
        rng.permuted(np.pad(positives, [(0, 3), (0, 1)], **more), axis=1),
        rng.permuted(np.pad(negatives, [(0, 3), (0, 2)], **more), axis=1),
    )
    (_, padded_sums), padded_gradients = candidates(*padded, 0.1)
    assert sums.count > 0
    for name in NUMBERS:
        assert float(getattr(padded_sums, name)) == pytest.approx(
            float(getattr(sums, name)), rel=1e-5
        )
    for found, one in zip(padded_gradients[:2], gradients, strict=False):
        np.testing.assert_allclose(found[: len(one)], one, rtol=1e-4, atol=1e-6)
        assert not np.any(found[len(one) :])


def test_no_candidates_at_all():
    none = np.full((4, 2), -1, np.int32)
    (_, sums), gradients = candidates(jnp.eye(4, 8), jnp.eye(4, 8), none, none, 0.02)
    assert all(float(number) == 0 for number in sums)
    assert not any(np.any(gradient) for gradient in gradients)
    # Positives without negatives teach nothing and are right.
    own = np.arange(4, dtype=np.int32)[:, None]
    (_, sums), gradients = candidates(jnp.eye(4, 8), jnp.eye(4, 8), own, none[:, :0], 0.02)
    assert LossSums(*map(float, sums)) == LossSums(0, 4, 4, 4, 0)
    assert not any(np.any(gradient) for gradient in gradients)


def test_bfloat16_scores_are_float32():
    queries, documents, *places = make_problem(2, width=64)
    queries, documents = queries.astype(jnp.bfloat16), documents.astype(jnp.bfloat16)
    wanted = expected(queries, documents, *places, 0.1)
    (_, sums), gradients = candidates(queries, documents, *places, 0.1)
    for name in NUMBERS:
        assert float(getattr(sums, name)) == pytest.approx(wanted.sums[name], rel=1e-5), name
    for found, one in zip(gradients[:2], wanted.gradients, strict=True):
        assert found.dtype == jnp.bfloat16
        assert error(found.astype(jnp.float32), one) <= 6e-3


@pytest.mark.parametrize("side", [0, 1])
def test_nan_reaches_the_loss(side):
    inputs = [jnp.eye(4, 8), jnp.eye(4, 8)]
    inputs[side] = inputs[side].at[1].set(jnp.nan)
    positives = np.arange(4, dtype=np.int32)[:, None]
    (loss, _), _ = candidates(*inputs, positives, (positives + 1) % 4, 0.1, margin=0.1)
    assert np.isnan(loss)


def test_only_candidates_are_scored():
    """No b x T numbers in the program; only the loss has a gradient."""
    rows, columns = 48, 1000
    shapes = [(rows, 16), (columns, 16), (rows, 2), (rows, 5)]
    texts = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes[:2]]
    places = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes[2:]]
    text = candidates.lower(*texts, *places, jnp.float32(0.1)).as_text()
    assert (
        f"{rows}x5" in text and f"{rows}x{columns}" not in text and f"{columns}x{rows}" not in text
    )

    @jax.jit
    @jax.grad
    def others(queries):
        sums = candidate_infonce(queries, *make_problem(0)[1:], temperature=0.1)
        return sums.correct + sums.positive_score - 3 * sums.hardest_negative_score

    assert not np.any(others(make_problem(0)[0]))


def test_strict_promotion_and_ranks():
    queries, *rest = make_problem(3)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.jit(partial(candidate_infonce, temperature=0.1, sizes=SIZES, margin=0.1)).lower(
            queries, *rest
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, d, p, n: (q, d[:, :-1], p, n), "shapes"),
        (lambda q, d, p, n: (q[:-1], d, p, n), "shapes"),
        (lambda q, d, p, n: (q, d, p, n[0]), "shapes"),
        (lambda q, d, p, n: (q, d.astype(jnp.bfloat16), p, n), "bfloat16"),
    ],
)
def test_inputs_that_do_not_fit(change, words):
    with pytest.raises(ValueError, match=words):
        candidate_infonce(*change(*make_problem(0)), temperature=0.1)
    with pytest.raises(ValueError, match="between 1 and 16"):
        candidate_infonce(*make_problem(0), temperature=0.1, sizes=[(17, 1.0)])
