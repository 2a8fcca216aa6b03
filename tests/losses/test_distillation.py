"""Distillation losses against fp64 references written out pair by pair."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from arcticjax.losses import DistillationSums, kl_divergence, margin_mse
from tests.losses.problems import as_float64, error, normalise

pytestmark = pytest.mark.usefixtures("quick_compiler")

POSITIVES = 2  # of the candidates' places, the rest are negatives


def make_problem(seed, rows=16, columns=24, width=12, places=6):
    """Some places empty, a row with none, one with one, one with a single pair; NaN where the
    teacher has nothing to say."""
    rng = np.random.default_rng(seed)
    queries, documents = (
        jnp.asarray(normalise(rng.normal(size=(count, width)) + 0.3), jnp.float32)
        for count in (rows, columns)
    )
    candidates = np.stack([rng.permutation(columns)[:places] for _ in range(rows)])
    candidates[rng.random((rows, places)) < 0.25] = -1
    candidates[0] = -1
    candidates[1] = [3, *[-1] * (places - 1)]
    candidates[2] = [-1, 5, 6, *[-1] * (places - 3)]
    teacher = rng.normal(size=(rows, places)).astype(np.float32) * 3
    teacher[3] = 1.5  # all equal
    return (
        queries,
        documents,
        candidates.astype(np.int32),
        np.where(candidates < 0, np.nan, teacher),
    )


def softmax(scores):
    odds = np.exp(scores - scores.max())
    return odds / odds.sum()


def kl_reference(queries, documents, candidates, teacher, temperature, teacher_temperature):
    """(loss, count, gradients) in fp64."""
    queries, documents = as_float64(queries), as_float64(documents)
    loss, count, query_grad, document_grad = (
        0.0,
        0,
        np.zeros_like(queries),
        np.zeros_like(documents),
    )
    for row, places in enumerate(candidates):
        kept = places >= 0
        if not kept.any():
            continue
        mine = documents[places[kept]]
        target = softmax(np.float64(teacher[row][kept]) / teacher_temperature)
        scores = mine @ queries[row] / temperature
        # relative to the largest, so that 1 - p is exact where one takes all
        top = scores.argmax()
        odds = np.exp(scores - scores[top])
        rest = np.delete(odds, top).sum()
        log_student = scores - scores[top] - np.log1p(rest)
        loss += target @ (np.log(target) - log_student)
        count += 1
        slopes = odds / (1 + rest) - target
        top_target = target.argmax()
        slopes[top_target] = -np.delete(slopes, top_target).sum()
        query_grad[row] += slopes @ mine / temperature
        np.add.at(document_grad, places[kept], np.outer(slopes, queries[row]) / temperature)
    return loss, count, (query_grad, document_grad)


def margin_reference(queries, documents, candidates, teacher, temperature):
    queries, documents = as_float64(queries), as_float64(documents)
    loss, count, query_grad, document_grad = (
        0.0,
        0,
        np.zeros_like(queries),
        np.zeros_like(documents),
    )
    for row, places in enumerate(candidates):
        for slot in range(POSITIVES):
            for other in range(POSITIVES, len(places)):
                if places[slot] < 0 or places[other] < 0:
                    continue
                apart = (documents[places[slot]] - documents[places[other]]) / temperature
                off = queries[row] @ apart - (
                    np.float64(teacher[row][slot]) - np.float64(teacher[row][other])
                )
                loss += off**2
                count += 1
                query_grad[row] += 2 * off * apart
                document_grad[places[slot]] += 2 * off * queries[row] / temperature
                document_grad[places[other]] -= 2 * off * queries[row] / temperature
    return loss, count, (query_grad, document_grad)


@partial(jax.jit, static_argnames="name")
def run(name, queries, documents, candidates, teacher, temperature, teacher_temperature=1.0):
    """((loss, sums), gradients) of queries, documents and temperature."""

    def loss(queries, documents, temperature):
        if name == "kl":
            sums = kl_divergence(
                queries,
                documents,
                candidates,
                teacher,
                temperature=temperature,
                teacher_temperature=teacher_temperature,
            )
        else:
            sums = margin_mse(
                queries,
                documents,
                candidates[:, :POSITIVES],
                candidates[:, POSITIVES:],
                teacher,
                temperature=temperature,
            )
        return sums.loss, sums

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
        queries, documents, temperature
    )


BOTH = pytest.mark.parametrize("name", ["kl", "margin"])


def expected(name, problem, temperature, teacher_temperature=1.0):
    if name == "kl":
        return kl_reference(*problem, temperature, teacher_temperature)
    return margin_reference(*problem, temperature)


@BOTH
@pytest.mark.parametrize("temperatures", [(0.05, 2.0), (1.0, 0.7)])
def test_everything_at_once_equals_the_reference(name, temperatures):
    problem = make_problem(0)
    loss, count, wanted = expected(name, problem, *temperatures)
    assert loss / count > 0.1
    (value, sums), gradients = run(name, *problem, *temperatures)
    assert float(value) == pytest.approx(loss, rel=1e-5)
    assert sums.count == count
    for found, one in zip(gradients[:2], wanted, strict=True):
        assert error(found, one) <= 1e-5
    step = 1e-4 * temperatures[0]
    up, down = (
        expected(name, problem, temperatures[0] + s, temperatures[1])[0] for s in (step, -step)
    )
    assert float(gradients[2]) == pytest.approx((up - down) / (2 * step), rel=1e-4)


@BOTH
def test_the_reference_gradient_is_a_difference_quotient(name):
    queries, documents, *rest = make_problem(1, rows=6, columns=9, width=4)
    _, _, wanted = expected(name, (queries, documents, *rest), 0.3)
    step = 2.0**-10
    for argument in range(2):
        for place in [(2, 0), (3, 2), (5, 3)]:
            losses = []
            for sign in (1, -1):
                texts = [np.array(queries), np.array(documents)]
                texts[argument][place] += sign * step
                losses.append(expected(name, (*texts, *rest), 0.3)[0])
            quotient = (losses[0] - losses[1]) / (2 * step)
            assert quotient == pytest.approx(wanted[argument][place], rel=1e-3, abs=1e-4)


def test_kl_gradient_where_teacher_and_student_are_certain():
    """Both give one candidate nearly all: its gradient must not be a difference of ones."""
    rng = np.random.default_rng(0)
    queries = normalise(rng.normal(size=(64, 96)))
    others = normalise(rng.normal(size=(192, 96)) + 1.0)
    documents = np.concatenate([normalise(queries + 0.3 * others[:64]), others])
    candidates = np.arange(64)[:, None] + np.array([0, 64, 128, 192])
    teacher = np.zeros((64, 4), np.float32)
    teacher[:, 0] = rng.uniform(14, 18, 64)
    problem = (
        jnp.asarray(queries, jnp.float32),
        jnp.asarray(documents, jnp.float32),
        candidates.astype(np.int32),
        teacher,
    )
    loss, count, wanted = expected("kl", problem, 0.06)
    assert loss / count < 1e-4
    (value, _), gradients = run("kl", *problem, 0.06)
    assert float(value) == pytest.approx(loss, rel=1e-4)
    for found, one in zip(gradients[:2], wanted, strict=True):
        assert error(found, one) <= 1e-5


def test_what_the_student_already_knows_costs_nothing():
    queries, documents, candidates, _ = make_problem(2)
    cosines = np.einsum("bd,bcd->bc", queries, np.asarray(documents)[candidates])
    (value, _), gradients = run("kl", queries, documents, candidates, cosines / 0.1, 0.1)
    assert abs(float(value)) < 1e-6 and error(gradients[0], 0) * 1e-30 < 1e-5
    # A constant added to the teacher's scores is no ranking and no margin.
    for name in ("kl", "margin"):
        shifted, _ = run(name, queries, documents, candidates, cosines / 0.1 + 2.5, 0.1)
        assert abs(float(shifted[0])) < 1e-6


@BOTH
def test_padding_changes_nothing(name):
    queries, documents, candidates, teacher = make_problem(3)
    (_, sums), gradients = run(name, queries, documents, candidates, teacher, 0.1)
    padded = (
        jnp.pad(queries, [(0, 3), (0, 0)]),
        jnp.pad(documents, [(0, 2), (0, 0)]),
        np.pad(candidates, [(0, 3), (0, 2)], constant_values=-1),
        np.pad(teacher, [(0, 3), (0, 2)], constant_values=-1e30),
    )
    (_, padded_sums), padded_gradients = run(name, *padded, 0.1)
    assert float(padded_sums.loss) == pytest.approx(float(sums.loss), rel=1e-6)
    assert padded_sums.count == sums.count > 0
    for found, one in zip(padded_gradients[:2], gradients, strict=False):
        np.testing.assert_allclose(found[: len(one)], one, rtol=1e-4, atol=1e-5)
        assert not np.any(found[len(one) :])


@BOTH
def test_one_candidate_and_none(name):
    """One candidate is a distribution without choice, and no margin."""
    candidates = np.array([[0, -1, -1, -1], [-1, -1, -1, 2], [-1] * 4], np.int32)
    teacher = np.full((3, 4), 5, np.float32)
    (_, sums), gradients = run(name, jnp.eye(3, 8), jnp.eye(4, 8), candidates, teacher, 0.1)
    assert DistillationSums(*map(float, sums)) == (0, 2 if name == "kl" else 0)
    assert not any(np.any(gradient) for gradient in gradients)


@BOTH
def test_ties(name):
    """Equal scores share equally, whichever comes first."""
    queries, documents, candidates, teacher = make_problem(4)
    documents = documents.at[1:].set(documents[0])  # all documents of the student tie
    problem = queries, documents, candidates, teacher
    loss, _, wanted = expected(name, problem, 0.1)
    (value, _), gradients = run(name, *problem, 0.1)
    assert float(value) == pytest.approx(loss, rel=1e-5)
    assert error(gradients[1], wanted[1]) <= 1e-5


def test_devices_equal_one_device():
    problem = make_problem(5)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    split, whole = P("data"), P()

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(split, whole, split, split),
        out_specs=(whole, (split, whole)),
    )
    def step(queries, documents, candidates, teacher):
        def mean(queries, documents):
            shared = queries, documents
            kl = kl_divergence(
                *shared, candidates, teacher, temperature=0.1, teacher_temperature=1.0
            )
            places = candidates[:, :POSITIVES], candidates[:, POSITIVES:]
            margin = margin_mse(*shared, *places, teacher)
            kl, margin = jax.lax.psum((kl, margin), "data")
            return kl.loss / kl.count + margin.loss / margin.count

        return jax.value_and_grad(mean, argnums=(0, 1))(queries, documents)

    one, other = (
        expected("kl", problem, 0.1),
        expected("margin", problem, 1.0),
    )
    value, gradients = step(*problem)
    assert float(value) == pytest.approx(one[0] / one[1] + other[0] / other[1], rel=1e-5)
    for found, first, second in zip(gradients, one[2], other[2], strict=True):
        assert error(found, first / one[1] + second / other[1]) <= 1e-5


@BOTH
def test_inputs_that_do_not_fit(name):
    queries, documents, candidates, teacher = make_problem(0)
    with pytest.raises(ValueError, match="teacher"):
        run(name, queries, documents, candidates, teacher[:, 1:], 0.1)
    with pytest.raises(ValueError, match="bfloat16"):
        run(name, queries, documents.astype(jnp.bfloat16), candidates, teacher, 0.1)
    with pytest.raises(ValueError, match="shapes"):
        run(name, queries[1:], documents, candidates, teacher, 0.1)
