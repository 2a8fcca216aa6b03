"""What a compiled training step sends between devices."""

import dataclasses
from collections import Counter

import jax
import pytest

from arcticjax.models.encoder import Encoder
from arcticjax.parallel import mesh as meshes
from arcticjax.parallel.hlo import collectives
from arcticjax.parallel.sharding import ALIGNMENT
from tests import tiny
from tests.step.parts import OBJECTIVE, make_step

# The optimisations left out move no collective.
pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(scope="module")
def compiled():
    """(options of the mesh, of the step) -> the collectives of the compiled step, the mesh and the
    parameters."""
    encoder = Encoder(tiny.SPEC)
    params = tiny.weights()
    builder = tiny.builder(8)

    def one(data, fsdp, slices, **options):
        mesh = meshes.make_mesh(data, fsdp, slices)
        with jax.set_mesh(mesh):
            state, step, kept = make_step(encoder, params, builder, mesh, **options)
            batch = meshes.host_to_global(mesh, builder(0).arrays)
            text = step.lower(state, kept, batch).compile().as_text()
        return collectives(text), dict(mesh.shape), params, builder.shapes

    return one


def of_documents(found, mesh, shapes):
    """(operation, axes, share of all documents) of what moves documents or their gradients."""
    size = shapes.devices * shapes.documents * tiny.SPEC.hidden_size * 4
    return [
        (one.op, one.axes(mesh), one.bytes / size)
        for one in found
        if "jvp(loss)" in one.purpose and one.op != "all-reduce" and one.bytes > size / 4
    ]


@pytest.mark.parametrize("passes", [pytest.param("one", marks=pytest.mark.slow), "two"])
def test_one_slice_and_whole_parameters(compiled, passes):
    """Documents once out and once back, labels once out, gradients once reduced and parameters once
    put together; nothing inside a loop. By default, a plan's test counts those
    of one pass (tests/plan/test_plan_command.py)."""
    found, mesh, params, shapes = compiled(8, 1, 1, passes=passes)
    leaves = len(jax.tree.leaves(params))
    assert not any(one.in_loop for one in found)
    assert all(one.axes(mesh) == ("data",) for one in found)
    assert of_documents(found, mesh, shapes) == [
        ("all-gather", ("data",), 1),
        ("reduce-scatter", ("data",), 1),
    ]
    count, size = Counter(), Counter()
    for one in found:
        count[one.op] += 1
        size[one.op] += one.bytes
    assert set(count) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert count["all-gather"] == 2 + leaves  # document embeddings, column groups
    assert count["reduce-scatter"] == 1 + leaves
    # Scalars of the loss and the metrics.
    assert count["all-reduce"] <= 6 and size["all-reduce"] <= 64
    # In bytes: embeddings and labels, and every parameter once, each leaf padded.
    rows = sum(leaf.shape[0] if leaf.ndim > 1 else 1 for leaf in jax.tree.leaves(params))
    places = 4 * shapes.devices * shapes.documents
    moved = places * tiny.SPEC.hidden_size + 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert moved <= size["reduce-scatter"] <= moved + 4 * ALIGNMENT * rows
    assert size["all-gather"] == size["reduce-scatter"] + places


@pytest.mark.parametrize(
    "passes, fsdp", [pytest.param("one", 2, marks=pytest.mark.slow), ("two", 4)]
)
def test_shared_matrices(compiled, passes, fsdp):
    """Inside loops only the layers' matrices move, between the devices that share them: gathered
    once a forward pass and once more for the backward, their gradients scattered once."""
    found, mesh, params, _ = compiled(8 // fsdp, fsdp, 1, passes=passes)
    inside = Counter((one.op, one.axes(mesh)) for one in found if one.in_loop)
    matrices = sum(leaf.ndim == 3 for leaf in jax.tree.leaves(params))
    forward = {"one": 1, "two": 2}[passes]
    assert inside == {
        ("all-gather", ("fsdp",)): (forward + 1) * matrices,
        ("reduce-scatter", ("fsdp",)): matrices,
    }
    outside = Counter(one.op for one in found if not one.in_loop)
    leaves = len(jax.tree.leaves(params))
    assert outside["all-gather"] == 2 + leaves
    assert outside["reduce-scatter"] == 1 + leaves


def test_two_slices(compiled):
    """Documents and labels go out in two hops, inside a slice first; so do gradients of documents,
    the other way round. Between slices, gradients of parameters move in pieces."""
    found, mesh, params, shapes = compiled(8, 1, 2)
    assert not any(one.in_loop for one in found)
    assert of_documents(found, mesh, shapes) == [
        ("all-gather", ("data",), 1 / 2),
        ("all-gather", ("slice",), 1),
        ("reduce-scatter", ("slice",), 1),
        ("reduce-scatter", ("data",), 1 / 2),
    ]
    between = [one for one in found if one.axes(mesh) == ("slice",)]
    pieces = sum(one.bytes for one in between if one.op == "all-reduce")
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 4 * numbers / 4 <= pieces <= 1.5 * 4 * numbers / 4


@pytest.mark.parametrize(
    "terms",
    [
        pytest.param({"symmetric": True}, marks=pytest.mark.slow),
        {"query_query": True, "document_query": True},
    ],
    ids=" and ".join,
)
def test_terms_that_need_all_queries_gather_them_once(compiled, terms):
    objective = dataclasses.replace(OBJECTIVE, **terms)
    found, _, params, _ = compiled(8, 1, 1, objective=objective)
    leaves = len(jax.tree.leaves(params))
    assert not any(one.in_loop for one in found)
    count = Counter(one.op for one in found)
    assert count["all-gather"] == 4 + leaves  # documents, queries, and the groups of both
    assert count["reduce-scatter"] == 2 + leaves
