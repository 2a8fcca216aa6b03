"""The training step against a plain one.

The plain one: padded texts, the whole score matrix, one device, automatic gradients.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arcticjax.losses.reference import dense_infonce
from arcticjax.models.encoder import Encoder
from arcticjax.parallel import mesh as meshes
from arcticjax.step import activations
from arcticjax.step import state as states
from arcticjax.step import train as steps
from tests import tiny
from tests.step.plain import padded, read

TEMPERATURE = 0.2
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@pytest.fixture(scope="module")
def encoder():
    return Encoder(tiny.SPEC)


@pytest.fixture(scope="module")
def params(encoder):
    return jax.device_get(encoder.init(jax.random.key(0)))


@pytest.fixture(scope="module")
def plain(encoder, params):
    """(builder, step) -> loss, accuracy, gradient by the definition: texts padded, all scores."""

    def embed(params, rows):
        return encoder.embed(params, *rows, pooling="mean")[:, 0]

    def mean_loss(params, query_rows, document_rows, labels):
        sums = dense_infonce(
            embed(params, query_rows),
            embed(params, document_rows),
            labels,
            temperature=TEMPERATURE,
        )
        return sums.loss / sums.count, sums.correct / sums.count

    compiled = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))

    def one(builder, step):
        queries, documents, labels = read(builder, step)
        (loss, accuracy), gradient = compiled(
            params, padded(queries, tiny.QUERY), padded(documents, tiny.DOCUMENT), labels
        )
        return loss, accuracy, gradient

    return one


def make_gradient(encoder, builder, mesh, *, dtype=jnp.float32, passes="two"):
    """The gradient and its buffers."""
    shared = {"pooling": "mean", "dtype": dtype, "passes": passes}
    kept = activations.allocate(steps.kept_shapes(encoder, builder.shapes, mesh, **shared), mesh)
    gradient = steps.make_gradient(
        encoder, builder.shapes, mesh, temperature=TEMPERATURE, tile=8, **shared
    )
    return gradient, kept


def gradient_program(encoder, params, builder, devices, **options):
    """step -> (gradients, metrics), compiled once."""
    mesh = meshes.make_mesh(devices)
    with jax.set_mesh(mesh):
        gradient, kept = make_gradient(encoder, builder, mesh, **options)
        program = jax.jit(gradient, donate_argnums=1)
        replicated = meshes.replicate(mesh, params)

    def one(step):
        nonlocal kept
        with jax.set_mesh(mesh):
            batch = meshes.host_to_global(mesh, builder(step).arrays)
            gradients, kept, metrics = program(replicated, kept, batch)
        return gradients, metrics

    return one


@pytest.mark.parametrize("devices, rows, passes", [(2, 4, "two"), (8, 1, "one")])
def test_loss_and_gradient_equal_the_plain_ones(encoder, params, plain, devices, rows, passes):
    """Batch after batch; more ways to take a step are in test_step_equivalence."""
    builder = tiny.builder(devices, rows=rows)
    program = gradient_program(encoder, params, builder, devices, passes=passes)
    for step in range(3):
        gradients, metrics = program(step)
        loss, accuracy, wanted = plain(builder, step)
        assert 0.5 < loss < 10  # of order one: agreement says something
        np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-6)
        np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
        norm = float(optax.tree.norm(wanted))
        differences = jax.tree.map(jnp.subtract, gradients, wanted)
        for path, difference in jax.tree_util.tree_leaves_with_path(differences):
            assert float(jnp.abs(difference).max()) < 1e-5 * norm, path


def test_what_is_kept_is_activations(encoder):
    """Nothing as large as a parameter, and for every microbatch; two passes keep nothing."""
    shapes, mesh = tiny.builder(2).shapes, meshes.make_mesh(2)
    options = {"pooling": "mean", "dtype": jnp.float32}
    assert steps.kept_shapes(encoder, shapes, mesh, passes="two", **options) == []
    kept = steps.kept_shapes(encoder, shapes, mesh, passes="one", **options)
    assert {one.shape[:2] for one in kept} == {(2, shapes.microbatches)}
    spec, tokens = tiny.SPEC, shapes.rows * shapes.row_length
    # A layer keeps its input, three attention inputs, the mix, the output and two wide arrays.
    layer = tokens * (6 * spec.hidden_size + 2 * spec.intermediate_size)
    least = 4 * shapes.microbatches * spec.num_layers * layer
    assert least <= activations.buffer_bytes(kept) <= 1.25 * least


def test_metrics_count_tokens_and_slots(encoder, params):
    builder = tiny.builder(2)
    host = builder(0)
    _, metrics = gradient_program(encoder, params, builder, 2)(0)
    tokens = host.arrays["lengths"].sum()
    used = host.arrays["microbatches"].max()
    assert metrics["tokens"] == tokens
    assert metrics["microbatches"] == used
    np.testing.assert_allclose(metrics["fill"], tokens / (2 * used * 2 * 32), rtol=1e-6)


def test_bfloat16_stays_near_float32(encoder, params):
    builder = tiny.builder(1)
    exact, exact_metrics = gradient_program(encoder, params, builder, 1)(0)
    coarse, coarse_metrics = gradient_program(encoder, params, builder, 1, dtype=jnp.bfloat16)(0)
    assert abs(coarse_metrics["loss"] - exact_metrics["loss"]) < 0.02
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, exact, coarse))
    assert 1e-4 < difference / optax.tree.norm(exact) < 0.05


def collectives(text: str) -> dict[tuple[str, bool], int]:
    """Counts the collectives of a compiled program: (operation, whether a loop reaches it) ->
    number."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if match := re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = match.group(1)
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    reached = set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", text))
    assert reached  # the program has loops
    while True:
        called = {
            callee
            for body in reached
            for line in bodies.get(body, [])
            for callee in re.findall(
                r"(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.\-]+)", line
            )
        }
        if called <= reached:
            break
        reached |= called
    found: dict[tuple[str, bool], int] = {}
    for name, lines in bodies.items():
        for operation in COLLECTIVES:
            number = sum(bool(re.search(rf"= .*\b{operation}(-start)?\(", line)) for line in lines)
            if number:
                key = (operation, name in reached)
                found[key] = found.get(key, 0) + number
    return found


@pytest.mark.parametrize("passes", ["one", "two"])
def test_the_list_of_collectives(encoder, params, passes):
    """Documents once out and once back, labels once out, the rest reduced; nothing inside a
    loop."""
    mesh = meshes.make_mesh(8)
    builder = tiny.builder(8)
    with jax.set_mesh(mesh):
        gradient, kept = make_gradient(encoder, builder, mesh, passes=passes)
        batch = meshes.host_to_global(mesh, builder(0).arrays)
        arguments = meshes.replicate(mesh, params), kept, batch
        text = jax.jit(gradient, donate_argnums=1).lower(*arguments).compile().as_text()
    found = collectives(text)
    assert not any(in_loop for _, in_loop in found), found
    assert found[("all-gather", False)] == 2  # document embeddings, column groups
    assert found[("reduce-scatter", False)] == 1
    # Parameters' gradients combine into few; scalars of the loss and the metrics are the rest.
    assert found[("all-reduce", False)] <= 6, found
    assert set(found) == {("all-gather", False), ("reduce-scatter", False), ("all-reduce", False)}


def make_step(encoder, builder, mesh, learning_rate=2e-3, passes="two"):
    """Optimiser, step and its buffers."""
    gradient, kept = make_gradient(encoder, builder, mesh, passes=passes)
    schedule = optax.constant_schedule(learning_rate)
    optimizer = optax.adamw(schedule)
    step = jax.jit(steps.make_train_step(gradient, optimizer, schedule), donate_argnums=(0, 1))
    return optimizer, step, kept


def test_training_lowers_the_loss(encoder, params):
    mesh = meshes.make_mesh(1)
    builder = tiny.builder(1, views=[tiny.memory_view("one", 0, records=32, shared=0.0)])
    with jax.set_mesh(mesh):
        optimizer, step, kept = make_step(encoder, builder, mesh)
        state = states.init_state(params, optimizer, mesh)
        losses = []
        for number in range(60):
            batch = meshes.host_to_global(mesh, builder(number).arrays)
            state, kept, metrics = step(state, kept, batch)
            losses.append(float(metrics["loss"]))
    assert int(state["step"]) == 60
    assert losses[-1] < 0.5 * losses[0]


def test_one_program_serves_all_sources(encoder, params):
    mesh = meshes.make_mesh(1)
    builder = tiny.builder(1)
    with jax.set_mesh(mesh):
        optimizer, step, kept = make_step(encoder, builder, mesh)
        state = states.init_state(params, optimizer, mesh)
        sources = set()
        for number in range(6):
            host = builder(number)
            sources.add((host.source, int(host.arrays["microbatches"][0])))
            state, kept, _ = step(state, kept, meshes.host_to_global(mesh, host.arrays))
    assert len({microbatches for _, microbatches in sources}) > 1  # unlike amounts of work
    assert step._cache_size() == 1


def test_a_gradient_that_is_not_finite_changes_nothing(encoder, params):
    mesh = meshes.make_mesh(1)
    builder = tiny.builder(1)
    broken = jax.tree.map(np.copy, params)
    broken["embeddings"]["token"][20] = np.nan
    with jax.set_mesh(mesh):
        optimizer, step, kept = make_step(encoder, builder, mesh)
        state = states.init_state(broken, optimizer, mesh)
        before = jax.device_get(state)
        state, _, metrics = step(state, kept, meshes.host_to_global(mesh, builder(0).arrays))
    assert not metrics["finite"]
    for old, new in zip(
        jax.tree.leaves(before["params"]), jax.tree.leaves(state["params"]), strict=True
    ):
        np.testing.assert_array_equal(old, new)
    assert int(jax.tree.leaves(state["optimizer"])[0]) == 0  # the optimiser's count did not move
