"""The abstract program is the one that training runs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from arcticjax import errors
from arcticjax.config import load_config
from arcticjax.parallel import mesh as meshes
from arcticjax.step import activations, program
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(scope="module", params=["one", "two"])
def built(request, tmp_path_factory):
    """(program, batches) on four devices."""
    folder = tmp_path_factory.mktemp("program")
    changes = {"train.passes": request.param, "mesh.fsdp": 2, "train.precision": "bfloat16"}
    config = load_config(tiny.run_config(folder, **changes))
    mesh = meshes.make_mesh(2, 2)
    batches = tiny.builder(4)
    with jax.set_mesh(mesh):
        yield (
            program.build(config, tiny.SPEC, "mean", batches.shapes, mesh, 8, None),
            batches,
        )


def same(real, abstract):
    assert jax.tree.structure(real) == jax.tree.structure(abstract)
    for one, other in zip(jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_abstract_arrays_are_those_of_a_run(built):
    made, batches = built
    params = tiny.weights()
    same(made.initial_state(params), made.abstract_state())
    same(meshes.host_to_global(made.mesh, batches(0).arrays), made.abstract_batch())
    same(activations.allocate(made.kept, made.mesh), made.abstract_buffers())
    assert bool(made.kept) == (made.encoding.passes == "one")


def test_the_config_decides_what_the_step_computes(built):
    made, _ = built
    assert (made.objective.temperature, made.objective.tile) == (0.1, 8)
    assert made.encoding.dtype == jnp.bfloat16
    halves = {one.dtype for one in made.kept if one.dtype != jnp.float32}
    assert halves == ({jnp.dtype(jnp.bfloat16)} if made.kept else set())


def test_a_rung_that_no_batch_can_fill_is_refused(tmp_path):
    """Whatever the lengths of 8 pairs, best fit never opens more rows than that."""
    shapes = dataclasses.replace(tiny.builder(4).shapes, ladder=(2, 99))
    config = load_config(tiny.run_config(tmp_path))
    message = rf"train\.ladder: 99 rows are more than the {shapes.room} that the 8 pairs"
    with pytest.raises(errors.ConfigError, match=message):
        program.build(config, tiny.SPEC, "mean", shapes, meshes.make_mesh(4), 8, None)
