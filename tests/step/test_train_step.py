"""The training step against a plain one.

The plain one: padded texts, the whole score matrix, one device, automatic gradients.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arcticjax.losses import Guide
from arcticjax.losses.reference import dense_infonce
from arcticjax.models.encoder import Encoder
from arcticjax.parallel import mesh as meshes
from arcticjax.parallel.sharding import ALIGNMENT
from arcticjax.step import activations
from arcticjax.step import state as states
from arcticjax.step import train as steps
from arcticjax.step.objective import Objective
from tests import tiny
from tests.models.family_specs import SPECS
from tests.step.parts import TEMPERATURE, gradient_program, make_parts, make_step
from tests.step.plain import padded, read

pytestmark = pytest.mark.usefixtures("quick_compiler")
LEARNED = Objective(TEMPERATURE, learn_temperature=True, tile=8)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(tiny.SPEC)


@pytest.fixture(scope="module")
def params():
    return tiny.weights()


@pytest.fixture(scope="module")
def plain(encoder, params):
    return by_definition(encoder, params)


def by_definition(encoder, params, guide=None, guide_margin=0.0):
    """(builder, step) -> loss, accuracy, gradient by the definition: texts padded, all scores.
    guide: its encoding and parameters."""

    def embed(params, rows):
        return encoder.embed(params, *rows, pooling="mean")[:, 0]

    def mean_loss(params, query_rows, document_rows, labels):
        guided = None
        if guide is not None:
            guided = Guide(
                *(
                    guide[0].encoder.embed(guide[1], *rows, pooling=guide[0].pooling)[:, 0]
                    for rows in (query_rows, document_rows)
                )
            )
        sums = dense_infonce(
            embed(params, query_rows),
            embed(params, document_rows),
            labels,
            temperature=TEMPERATURE,
            guide=guided,
            guide_margin=guide_margin,
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


@pytest.fixture(scope="module")
def one_device(encoder, params):
    """(parameters) -> the mesh, a state, the step, which is compiled once, and its buffers."""
    mesh, builder = meshes.make_mesh(1), tiny.builder(1)
    with jax.set_mesh(mesh):
        _, step, _ = make_step(encoder, params, builder, mesh)

    def fresh(params=params):
        with jax.set_mesh(mesh):
            state, _, kept = make_step(encoder, params, builder, mesh)
        return mesh, state, step, kept

    return fresh


@pytest.mark.parametrize(
    ("devices", "ladder", "options"),
    [
        # Rows in use: 29, 17 and 24, on the fullest of four devices 8, 5 and 7.
        (1, (18, 24), {"apart": True, "remat": "dots"}),
        (4, (5, 7), {"slices": 2, "fsdp": 2}),
    ],
    ids=str,
)
def test_a_batch_that_a_rung_holds_is_encoded_at_once(
    encoder, params, plain, devices, ladder, options
):
    """In the smallest rung that holds it, larger ones in turns; the same gradient either way."""
    builder = tiny.builder(devices)
    shapes = dataclasses.replace(builder.shapes, ladder=ladder)
    builder = dataclasses.replace(builder, shapes=shapes)
    program = gradient_program(encoder, params, builder, devices, **options)
    encoded = []
    for step in range(3):
        gradients, metrics = program(step)
        arrays = builder(step).arrays
        used = int((arrays["lengths"].sum(-1) > 0).sum((1, 2)).max())
        fits = used <= ladder[-1]
        rows = next(rows for rows in ladder if rows >= used) if fits else -(-used // 2) * 2
        encoded.append(rows)
        assert metrics["microbatches"] == (1 if fits else rows // 2)
        fill = arrays["lengths"].sum() / (devices * rows * 32)
        np.testing.assert_allclose(metrics["fill"], fill, rtol=1e-6)
        loss, _, wanted = plain(builder, step)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-6)
        norm = float(optax.tree.norm(wanted))
        differences = jax.tree.map(jnp.subtract, gradients, wanted)
        for path, difference in jax.tree_util.tree_leaves_with_path(differences):
            assert float(jnp.abs(difference).max()) < 1e-5 * norm, path
    assert {*ladder} < {*encoded}  # every rung, and once none


@pytest.mark.parametrize(
    "devices, rows, options",
    [
        (2, 4, {"remat": "full", "passes": "one"}),
        (8, 1, {"remat": "dots", "slices": 2, "fsdp": 2, "apart": True}),
        (8, 1, {"remat": "named", "fsdp": 4, "passes": "one"}),
    ],
    ids=str,
)
def test_loss_and_gradient_equal_the_plain_ones(encoder, params, plain, devices, rows, options):
    """Batch after batch, and what the metrics count; more ways to take a step are in
    test_step_equivalence."""
    builder = tiny.builder(devices, rows=rows)
    program = gradient_program(encoder, params, builder, devices, **options)
    for step in range(3):
        gradients, metrics = program(step)
        host = builder(step)
        tokens, used = host.arrays["lengths"].sum(), -(-host.rows // rows)
        assert (metrics["tokens"], metrics["microbatches"]) == (tokens, used)
        np.testing.assert_allclose(
            metrics["fill"], tokens / (devices * used * rows * 32), rtol=1e-6
        )
        loss, accuracy, wanted = plain(builder, step)
        assert 0.5 < loss < 10  # of order one: agreement says something
        np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-6)
        np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
        norm = float(optax.tree.norm(wanted))
        differences = jax.tree.map(jnp.subtract, gradients, wanted)
        for path, difference in jax.tree_util.tree_leaves_with_path(differences):
            assert float(jnp.abs(difference).max()) < 1e-5 * norm, path


@pytest.mark.slow
def test_a_guide_reads_the_same_rows(encoder, params, plain):
    """Frozen and of other sizes; it is no part of what is trained. tests/train/test_guide.py holds
    the same by default, in a whole run."""
    spec = dataclasses.replace(tiny.SPEC, hidden_size=16, num_layers=1, num_heads=2)
    guide = steps.Encoding(Encoder(spec), "mean"), Encoder(spec).init(jax.random.key(7))
    objective, builder = Objective(TEMPERATURE, tile=8, guide_margin=0.01), tiny.builder(4, rows=1)
    loss, accuracy, wanted = by_definition(encoder, params, guide, 0.01)(builder, 1)
    assert loss < 0.98 * plain(builder, 1)[0]  # it leaves something out
    program = gradient_program(
        encoder, params, builder, 4, fsdp=2, passes="one", objective=objective, guide=guide
    )
    gradients, metrics = program(1)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-6)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
    assert jax.tree.structure(gradients) == jax.tree.structure(wanted)
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, gradients, wanted))
    assert difference < 1e-5 * float(optax.tree.norm(wanted))


def test_what_is_kept_is_activations(encoder):
    """Nothing as large as a parameter, and for every microbatch; two passes keep nothing."""
    builder, mesh = tiny.builder(2), meshes.make_mesh(2)
    shapes = builder.shapes
    assert make_parts(encoder, builder, mesh, passes="two")[1] == []
    kept = make_parts(encoder, builder, mesh, passes="one", remat="named")[1]
    assert {one.shape[:2] for one in kept} == {(2, shapes.microbatches)}
    spec, tokens = tiny.SPEC, shapes.rows * shapes.row_length
    # A layer keeps its input, three attention inputs, the mix, the output and two wide arrays.
    layer = tokens * (6 * spec.hidden_size + 2 * spec.intermediate_size)
    least = 4 * shapes.microbatches * spec.num_layers * layer
    assert least <= activations.buffer_bytes(kept) <= 1.25 * least


@pytest.mark.parametrize("family", SPECS)
def test_what_all_layers_read_is_kept_by_none(family):
    """Masks, rotary turns and parameters are at hand in both passes."""
    builder, mesh, spec = tiny.builder(1), meshes.make_mesh(1), SPECS[family]
    shapes = builder.shapes
    row = (spec.num_layers, shapes.rows, shapes.row_length)

    def kept(remat):
        made = make_parts(Encoder(spec), builder, mesh, passes="one", remat=remat)[1]
        return [one.shape[2:] for one in made]

    *layered, last = kept("full")
    assert layered == [(*row, spec.hidden_size)] and last == layered[0][1:]
    for shape in kept("dots")[:-1]:
        heads = (spec.num_layers, shapes.rows, spec.num_heads, shapes.row_length, spec.head_size)
        assert shape[:3] == row or shape == heads


def test_the_state_is_the_same_on_every_mesh_and_cut_on_each(encoder, params):
    """Pieces stand in the order of the whole, so another mesh reads the same checkpoint; a device
    holds its share of the optimiser's two numbers a parameter and no more (ZeRO stage 1)."""
    builders = {1: tiny.builder(1), 8: tiny.builder(8)}
    wholes = []
    for data, fsdp, slices in ((1, 1, 1), (4, 2, 2)):
        mesh = meshes.make_mesh(data, fsdp, slices)
        builder = builders[data * fsdp]
        with jax.set_mesh(mesh):
            # A large epsilon: gradients that are rounding alone must not be blown up.
            state, step, kept = make_step(
                encoder, params, builder, mesh, epsilon=1.0, objective=LEARNED
            )
            for number in range(2):
                batch = meshes.host_to_global(mesh, builder(number).arrays)
                state, kept, _ = step(state, kept, batch)
        wholes.append(jax.device_get(state))
        numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
        own = sum(
            leaf.addressable_shards[-1].data.nbytes for leaf in jax.tree.leaves(state["optimizer"])
        )
        # In a model this small the padding of 21 leaves is a good part.
        padding = sum(
            2 * ALIGNMENT * (leaf.shape[0] if leaf.ndim == 2 else 1)
            for leaf in jax.tree.leaves(params)
        )
        assert own <= 8 * (numbers + padding) * slices / mesh.size
    one, other = wholes
    assert jax.tree.map(np.shape, other) == jax.tree.map(np.shape, one)
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, other)
    for path, difference in jax.tree_util.tree_leaves_with_path(differences):
        assert difference < 1e-5, path


def test_gradients_are_clipped_by_their_global_norm(encoder, params):
    """With plain gradient descent at rate 1 the change is the clipped gradient."""
    mesh = meshes.make_mesh(8)
    builder = tiny.builder(8)
    batch = meshes.host_to_global(mesh, builder(0).arrays)
    parts, kept = make_parts(encoder, builder, mesh)
    optimizer = optax.sgd(1.0)

    @jax.jit
    def step(clip_norm, *arguments):  # compiled once for both norms
        return steps.make_train_step(*parts, optimizer, lambda step: 1.0, clip_norm)(*arguments)

    changes = {}
    for clip_norm in (1e9, 0.25):
        with jax.set_mesh(mesh):
            state = states.init_state({"params": params, "loss": {}}, optimizer, parts[-1])
            state, _, metrics = step(clip_norm, state, kept, batch)
        changes[clip_norm] = jax.tree.map(np.subtract, jax.device_get(state["params"]), params)
        assert float(metrics["gradient_norm"]) > 0.5
    free = float(optax.tree.norm(changes[1e9]))
    assert free == pytest.approx(float(metrics["gradient_norm"]), rel=1e-5)
    assert float(optax.tree.norm(changes[0.25])) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.slow
def test_training_lowers_the_loss(one_device):
    mesh, state, step, kept = one_device()
    builder = tiny.builder(1, views=[tiny.memory_view("one", 0, records=32, shared=0.0)])
    with jax.set_mesh(mesh):
        losses = []
        for number in range(60):
            batch = meshes.host_to_global(mesh, builder(number).arrays)
            state, kept, metrics = step(state, kept, batch)
            losses.append(float(metrics["loss"]))
    assert int(state["step"]) == 60
    assert losses[-1] < 0.5 * losses[0]


def test_one_program_serves_all_sources(one_device):
    mesh, state, step, kept = one_device()
    builder = tiny.builder(1)
    with jax.set_mesh(mesh):
        sources = set()
        for number in range(6):
            host = builder(number)
            sources.add((host.source, -(-host.rows // builder.shapes.rows)))
            state, kept, _ = step(state, kept, meshes.host_to_global(mesh, host.arrays))
    assert len({microbatches for _, microbatches in sources}) > 1  # unlike amounts of work
    assert step._cache_size() == 1


def test_a_gradient_that_is_not_finite_changes_nothing(one_device, params):
    builder = tiny.builder(1)
    broken = jax.tree.map(np.copy, params)
    broken["embeddings"]["token"][20] = np.nan
    mesh, state, step, kept = one_device(broken)
    with jax.set_mesh(mesh):
        before = jax.device_get(state)
        state, _, metrics = step(state, kept, meshes.host_to_global(mesh, builder(0).arrays))
    assert not metrics["finite"]
    for old, new in zip(
        jax.tree.leaves(before["params"]), jax.tree.leaves(state["params"]), strict=True
    ):
        np.testing.assert_array_equal(old, new)
    assert int(jax.tree.leaves(state["optimizer"])[0]) == 0  # the optimiser's count did not move
