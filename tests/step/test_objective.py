"""Every term of the loss on several devices against its definition on one, with whole matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from arcticjax.losses import Contrast, Guide, Labels, dense_infonce
from arcticjax.parallel import mesh as meshes
from arcticjax.step.objective import Objective

pytestmark = pytest.mark.usefixtures("quick_compiler")

PAIRS, WIDTH = 32, 12
PLAIN = Objective(0.3, tile=5)
ALL = {
    "symmetric": True,
    "query_query": True,
    "document_query": True,
    "document_document": True,
    "matryoshka": ((12, 0.5), (4, 0.25)),
    "margin": 0.1,
}
CASES = {
    "plain": {},
    "symmetric": {"symmetric": True, "learn_temperature": True},
    "all": {**ALL, "learn_temperature": True},
    "guide": {
        "symmetric": True,
        "query_query": True,
        "document_query": True,
        "document_document": True,
        "guide_margin": 0.1,
    },
}


@pytest.fixture(scope="module")
def problem():
    """Texts of all devices, by the encoder and by a guide, and labels in which documents are shared
    and places are empty."""
    rng = np.random.default_rng(0)
    queries, documents = (
        texts / np.linalg.norm(texts, axis=1, keepdims=True)
        for texts in rng.normal(0.2, 1, (2, PAIRS, WIDTH)).astype(np.float32)
    )
    positives = np.arange(PAIRS)
    positives[3], positives[20] = 9, 4  # documents that other devices encode
    groups = np.arange(PAIRS)
    groups[3], groups[20] = 9, 4
    column_groups = np.arange(PAIRS)
    column_groups[[3, 20]] = -1  # nobody needs these places
    labels = (positives[:, None], groups, column_groups)
    guided = rng.normal(0.2, 1, (2, PAIRS, 5)).astype(np.float32)
    guided /= np.linalg.norm(guided, axis=2, keepdims=True)
    return queries, documents, [part.astype(np.int32) for part in labels], guided


def on_devices(objective, problem, devices):
    queries, documents, (positives, groups, columns), guided = problem
    mesh = meshes.make_mesh(devices)

    def by_device(queries, documents):
        return np.concatenate(
            [part.reshape(devices, -1, part.shape[1]) for part in (queries, documents)], axis=1
        )

    texts = {"vectors": by_device(queries, documents)}
    if objective.guide_margin is not None:
        texts["guided"] = by_device(*guided)
    batch = {
        "positives": positives.reshape(devices, -1, 1),
        "row_groups": groups.reshape(devices, -1),
        "column_groups": columns.reshape(devices, -1),
    }

    def local(learned, texts, batch):
        vary = lambda leaf: jax.lax.pcast(leaf, meshes.AXES, to="varying")  # noqa: E731
        batch = {name: part[0] for name, part in batch.items()}
        (loss, sums), (learned_gradient, gradient) = jax.value_and_grad(
            objective, argnums=(0, 1), has_aux=True
        )(
            jax.tree.map(vary, learned),
            texts["vectors"][0],
            batch,
            texts["guided"][0] if "guided" in texts else None,
        )
        learned_gradient = jax.tree.map(
            lambda leaf: jax.lax.psum(leaf, meshes.AXES), learned_gradient
        )
        return loss, sums, learned_gradient, gradient[None]

    program = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), meshes.BATCH, meshes.BATCH),
        out_specs=(P(), P(), P(), meshes.BATCH),
    )
    loss, sums, learned, gradient = jax.jit(program)(
        objective.init(), *meshes.host_to_global(mesh, (texts, batch))
    )
    half = PAIRS // devices
    parts = np.split(np.asarray(gradient), [half], axis=1)
    return loss, sums, learned, [part.reshape(PAIRS, WIDTH) for part in parts]


def by_definition(objective, problem):
    """((loss, sums), gradients) of what is learned, of queries and of documents."""
    *texts, _, _ = problem
    mean_loss = jax.value_and_grad(definition(objective, problem), argnums=(0, 1, 2), has_aux=True)
    return jax.jit(mean_loss)(objective.init(), *texts)


def loss_by_definition(objective, problem):
    *texts, _, _ = problem
    return float(jax.jit(definition(objective, problem))(objective.init(), *texts)[0])


def definition(objective, problem):
    """(learned, queries, documents) -> the mean loss and sums."""
    *_, labels, guided = problem
    positives, groups, columns = map(jnp.asarray, labels)
    guided_queries, guided_documents = guided
    guided_own = guided_documents[positives[:, 0]]

    def guide(rows, columns):
        return None if objective.guide_margin is None else Guide(rows, columns)

    def mean_loss(learned, queries, documents):
        own = documents[positives[:, 0]]
        more = []
        if objective.query_query:
            guiding = guide(guided_queries, guided_queries)
            more.append(Contrast(queries, queries, groups, guiding))
        if objective.document_query:
            more.append(Contrast(own, queries, groups, guide(guided_own, guided_queries)))
        if objective.document_document:
            more.append(Contrast(own, documents, columns, guide(guided_own, guided_documents)))
        options = {
            "temperature": jnp.exp(learned["log_temperature"]) if learned else 0.3,
            "sizes": objective.matryoshka or None,
            "margin": objective.margin,
            "guide_margin": objective.guide_margin or 0.0,
        }
        there = dense_infonce(
            queries,
            documents,
            Labels(positives, groups, columns),
            contrasts=more,
            guide=guide(guided_queries, guided_documents),
            **options,
        )
        loss = there.loss / there.count
        if objective.symmetric:
            pairs = jnp.arange(PAIRS, dtype=jnp.int32)
            back = dense_infonce(
                own,
                queries,
                Labels(pairs[:, None], groups, groups),
                guide=guide(guided_own, guided_queries),
                **options,
            )
            loss = (loss + back.loss / back.count) / 2
        return loss, there

    return mean_loss


@pytest.mark.parametrize("case", CASES)
def test_equals_its_definition(problem, case):
    objective = dataclasses.replace(PLAIN, **CASES[case])
    (loss, sums), (learned, *gradients) = by_definition(objective, problem)
    found, found_sums, found_learned, found_gradients = on_devices(objective, problem, 8)
    assert float(found) == pytest.approx(float(loss), rel=1e-5)
    assert float(found) > 0.5
    for mine, wanted in zip(found_sums, sums, strict=True):
        assert float(mine) == pytest.approx(float(wanted), rel=1e-5)
    for mine, wanted in zip(found_gradients, gradients, strict=True):
        assert np.linalg.norm(mine - wanted) <= 1e-5 * np.linalg.norm(wanted)
    for name, wanted in learned.items():
        assert float(found_learned[name]) == pytest.approx(float(wanted), rel=1e-4)
    assert bool(learned) == objective.learn_temperature


def test_every_switch_changes_the_loss(problem):
    """Agreement would mean nothing for one that does nothing."""
    plain = loss_by_definition(PLAIN, problem)
    for name, value in {**ALL, "guide_margin": 0.1}.items():
        switched = loss_by_definition(dataclasses.replace(PLAIN, **{name: value}), problem)
        assert abs(switched - plain) > 1e-3, name


def test_bfloat16_gather_rounds_and_no_more(problem):
    (loss, _), (_, *gradients) = by_definition(PLAIN, problem)
    half = dataclasses.replace(PLAIN, gather_dtype="bfloat16")
    found, _, _, found_gradients = on_devices(half, problem, 8)
    assert float(found) == pytest.approx(float(loss), rel=5e-3)
    assert float(found) != pytest.approx(float(loss), rel=1e-7)
    for mine, wanted in zip(found_gradients, gradients, strict=True):
        assert 1e-4 < np.linalg.norm(mine - wanted) / np.linalg.norm(wanted) < 2e-2
