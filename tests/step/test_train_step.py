"""The training step against a plain one.

The plain one: padded texts, the whole score matrix, one device, automatic gradients.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arcticjax.losses.infonce import Labels
from arcticjax.losses.reference import dense_infonce
from arcticjax.models.encoder import Encoder
from arcticjax.parallel import mesh as meshes
from arcticjax.step import activations
from arcticjax.step import state as states
from arcticjax.step import train as steps
from tests import tiny

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

    def padded(texts, template):
        tokens = np.zeros((len(texts), template.longest), np.int32)
        lengths = np.zeros((len(texts), 1), np.int32)
        for row, text in enumerate(texts):
            own = text[: template.longest - template.overhead]
            whole = [*template.head, *own, template.end_id]
            tokens[row, : len(whole)] = whole
            lengths[row] = len(whole)
        return tokens, np.zeros_like(lengths), lengths

    def one(builder, step):
        drawn = builder.draw.at(step)
        view = builder.views[drawn.source]
        queries, documents = view.read(drawn.records)
        document_ids = view.document_ids(drawn.records)
        _, first, column = np.unique(document_ids, return_index=True, return_inverse=True)
        groups = union(view.query_ids(drawn.records), document_ids)
        # Each distinct document once; the columns left over are empty.
        columns = np.full(len(documents), -1)
        columns[: len(first)] = groups[first]
        once = [documents[i] for i in first] + [documents[0]] * (len(documents) - len(first))
        labels = Labels(*(np.asarray(x, np.int32) for x in (column[:, None], groups, columns)))
        (loss, accuracy), gradient = compiled(
            params, padded(queries, tiny.QUERY), padded(once, tiny.DOCUMENT), labels
        )
        return loss, accuracy, gradient

    return one


def union(query_ids, document_ids):
    """Connected components by plain relabelling."""
    groups = np.arange(len(query_ids))
    for _ in range(len(groups)):
        for ids in (query_ids, document_ids):
            for one in np.unique(ids):
                groups[ids == one] = groups[ids == one].min()
    return groups


def make_gradient(encoder, builder, mesh, *, dtype=jnp.float32, passes="two"):
    """The gradient and its buffers."""
    shared = {"pooling": "mean", "dtype": dtype, "passes": passes}
    kept = activations.allocate(steps.kept_shapes(encoder, builder.shapes, mesh, **shared), mesh)
    gradient = steps.make_gradient(
        encoder, builder.shapes, mesh, temperature=TEMPERATURE, tile=8, **shared
    )
    return gradient, kept


def gradient_program(encoder, params, builder, devices, slices=1, **options):
    """step -> (gradients, metrics), compiled once."""
    mesh = meshes.make_mesh(devices, slices=slices)
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


@pytest.mark.parametrize(
    "devices, slices, rows, passes",
    [
        (1, 1, 1, "two"),
        (1, 1, 4, "two"),
        (2, 1, 2, "two"),
        (8, 1, 1, "two"),
        (8, 2, 1, "two"),
        (8, 4, 1, "one"),
        (1, 1, 2, "one"),
        (8, 1, 1, "one"),
    ],
)
def test_loss_and_gradient_equal_the_plain_ones(
    encoder, params, plain, devices, slices, rows, passes
):
    builder = tiny.builder(devices, rows=rows)
    program = gradient_program(encoder, params, builder, devices, slices, passes=passes)
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


def document_groups(text: str, operation: str) -> list[list[list[int]]]:
    """The groups of devices of each collective that moves embeddings, in the program's order."""
    found = []
    for line in text.splitlines():
        if re.search(rf"= f32.* {operation}(-start)?\(", line):
            groups = re.search(r"replica_groups=(\{\{.*?\}\}|\[[\d,]+\]<=\[[\d,]+\]\S*)", line)
            assert groups, line
            found.append(expand(groups.group(1)))
    return found


def expand(groups: str) -> list[list[int]]:
    """`{{0,1},{2,3}}` or `[2,2]<=[4]` or `[2,2]<=[2,2]T(1,0)` as lists."""
    if groups.startswith("{"):
        return [list(map(int, one.split(","))) for one in groups.strip("{}").split("},{")]
    shape, dimensions, order = re.match(
        r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", groups
    ).groups()
    numbers = [list(map(int, one.split(","))) for one in (shape, dimensions)]
    grid = np.arange(np.prod(numbers[1])).reshape(numbers[1])
    if order:
        grid = grid.transpose(list(map(int, order.split(","))))
    return grid.reshape(numbers[0]).tolist()


@pytest.mark.parametrize("passes, slices", [("one", 1), ("two", 1), ("two", 2)])
def test_the_list_of_collectives(encoder, params, passes, slices):
    """Documents once out and once back, labels once out, the rest reduced; nothing inside a
    loop. With slices documents and labels go out in two hops, inside a slice first."""
    mesh = meshes.make_mesh(8, slices=slices)
    builder = tiny.builder(8)
    with jax.set_mesh(mesh):
        gradient, kept = make_gradient(encoder, builder, mesh, passes=passes)
        batch = meshes.host_to_global(mesh, builder(0).arrays)
        arguments = meshes.replicate(mesh, params), kept, batch
        text = jax.jit(gradient, donate_argnums=1).lower(*arguments).compile().as_text()
    found = collectives(text)
    assert not any(in_loop for _, in_loop in found), found
    within = [[0, 1, 2, 3], [4, 5, 6, 7]] if slices == 2 else [list(range(8))]
    hops = [within, [[0, 4], [1, 5], [2, 6], [3, 7]]][:slices]
    assert found[("all-gather", False)] == 2 * slices  # document embeddings, column groups
    assert found[("reduce-scatter", False)] == slices
    assert document_groups(text, "all-gather") == hops
    assert document_groups(text, "reduce-scatter") == hops[::-1]
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
