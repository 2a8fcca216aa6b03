"""The step part of the equivalence matrix (`tests.losses.equivalence`)."""

from dataclasses import replace
from functools import cache, lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcticjax.data.layout import Shapes
from arcticjax.models.encoder import Encoder
from arcticjax.parallel import mesh as meshes
from tests import tiny
from tests.losses import equivalence
from tests.losses.problems import reference
from tests.step.parts import TEMPERATURE, gradient_program, make_step
from tests.step.plain import padded, read

pytestmark = pytest.mark.usefixtures("quick_compiler")
BATCH, ROW_LENGTH = 32, 32
SOURCES = {"long": 0, "short": 1}


class OneText(Shapes):
    """A padded batch: one text a row."""

    slots = 1


@cache
def encoder_and_params():
    return Encoder(tiny.SPEC), tiny.weights()


def builder_of(devices, microbatches, rows):
    """many: the fewest rows a microbatch that give several; one: as many rows as can be needed."""
    builder = tiny.builder(devices, batch=BATCH, rows=1, row_length=ROW_LENGTH)
    kind = Shapes if rows == "packed" else OneText
    shapes = kind(**vars(builder.shapes))
    count = shapes.microbatches if microbatches == "one" else 2 if devices < 8 else 1
    return replace(builder, shapes=replace(shapes, rows=count))


@lru_cache(maxsize=2)
def program(devices, microbatches, rows, passes, dtype):
    """(builder, step -> (gradients, metrics)): the only place that knows how a step is made."""
    builder = builder_of(devices, microbatches, rows)
    encoder, params = encoder_and_params()
    return builder, gradient_program(
        encoder, params, builder, devices, passes=passes, dtype=jnp.dtype(dtype)
    )


@cache
def expected(source):
    """Step at which the source is drawn, mean loss and accuracy in fp64, gradients."""
    _, params = encoder_and_params()
    builder = tiny.builder(1, batch=BATCH)
    step = next(n for n in range(100) if builder.draw.at(n).source == SOURCES[source])
    queries, documents, labels = read(builder, step)
    rows = padded(queries, tiny.QUERY), padded(documents, tiny.DOCUMENT)

    vectors = plain_embed(params, rows)
    found = reference(*vectors, labels, TEMPERATURE)
    count = found.sums["count"]
    cotangents = [jnp.asarray(one / count, jnp.float32) for one in found.gradients]
    gradients = jax.device_get(plain_pull(params, rows, cotangents))
    return step, found.sums["loss"] / count, found.sums["correct"] / count, gradients


@jax.jit
def plain_embed(params, rows):
    encoder, _ = encoder_and_params()
    return [encoder.embed(params, *some, pooling="mean")[:, 0] for some in rows]


@jax.jit
def plain_pull(params, rows, cotangents):
    return jax.vjp(lambda params: plain_embed(params, rows), params)[1](cotangents)[0]


@equivalence.every_cell(equivalence.STEP)
def test_cell_equals_the_reference(cell):
    step, loss, accuracy, wanted = expected(cell["source"])
    assert 0.5 < loss < 10  # of order one: agreement says something
    builder, run = program(
        int(cell["devices"]),
        *(cell[axis] for axis in ("microbatches", "rows", "passes", "dtype")),
    )
    gradients, metrics = run(step)
    assert (metrics["microbatches"] > 1) == (cell["microbatches"] == "many")
    texts = (builder(step).arrays["lengths"] > 0).sum(axis=-1)
    assert (texts.max() > 1) == (cell["rows"] == "packed")
    exact, coarse = equivalence.TOLERANCES["step"][cell["dtype"]]
    assert float(metrics["loss"]) == pytest.approx(loss, rel=exact)
    if cell["dtype"] == "float32":
        assert float(metrics["accuracy"]) == pytest.approx(accuracy, rel=1e-6)
    apart = []
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(wanted)))
    for (path, found), one in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True
    ):
        assert np.linalg.norm(np.asarray(found) - one) <= coarse * norm, path
        apart.append(np.linalg.norm(np.asarray(found) - one) / norm)
    assert (max(apart) > 1e-4) == (cell["dtype"] == "bfloat16")


@pytest.mark.slow
def test_packed_and_padded_rows_give_the_same_losses_as_training_goes_on():
    paths = []
    for rows in ("packed", "padded"):
        builder, mesh = builder_of(1, "many", rows), meshes.make_mesh(1)
        with jax.set_mesh(mesh):
            state, step, kept = make_step(*encoder_and_params(), builder, mesh)
            losses = []
            for number in range(5):
                batch = meshes.host_to_global(mesh, builder(number).arrays)
                state, kept, metrics = step(state, kept, batch)
                losses.append(float(metrics["loss"]))
        paths.append(losses)
    np.testing.assert_allclose(*paths, rtol=1e-4)
    assert len(set(paths[0])) == 5
