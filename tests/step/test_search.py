"""Exact search on the mesh, against a sorted score matrix."""

import jax
import numpy as np
import pytest

from arcticjax.parallel import mesh as meshes
from arcticjax.step.search import search


def reference(queries, documents, k):
    scores = queries @ documents.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


@pytest.mark.parametrize("devices", [1, 4, 8])
@pytest.mark.parametrize(
    "documents, k, tile", [(1000, 10, 64), (37, 100, 4096), (300, 100, 32), (8, 1, 8)]
)
def test_equals_brute_force(devices, documents, k, tile):
    random = np.random.default_rng(documents)
    # Small whole numbers: every score is exact, and many are equal.
    queries_QD = random.integers(-2, 3, (13, 6)).astype(np.float32)
    documents_TD = random.integers(-2, 3, (documents, 6)).astype(np.float32)
    mesh = meshes.make_mesh(devices)
    with jax.set_mesh(mesh):
        scores, indices = search(queries_QD, documents_TD, k, mesh, query_block=8, tile=tile)
    wanted_scores, wanted_indices = reference(queries_QD, documents_TD, k)
    np.testing.assert_array_equal(scores, wanted_scores)
    np.testing.assert_array_equal(indices, wanted_indices)  # ties in the order of indices


def test_blocks_on_several_devices_of_a_cpu_wait_for_one_another(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    mesh = meshes.make_mesh(4)
    with jax.set_mesh(mesh):
        search(np.zeros((13, 6)), np.zeros((300, 6)), 100, mesh, query_block=8, tile=32)
    assert len(waited) == 2


def test_nothing_to_search():
    mesh = meshes.make_mesh(1)
    scores, indices = search(np.zeros((3, 4), np.float32), np.zeros((0, 4), np.float32), 10, mesh)
    assert scores.shape == indices.shape == (3, 0)


def integers(queries, documents):
    return queries.astype(np.int32) @ documents.T.astype(np.int32)


def test_other_scores_of_other_types():
    """Integers beyond float32's reach stay apart."""
    documents = np.array([[100, 127], [100, 126], [100, 127]], np.int8).repeat(500, axis=1)
    mesh = meshes.make_mesh(4)
    with jax.set_mesh(mesh):
        scores, indices = search(documents[:1], documents, 3, mesh, score=integers)
    assert scores.dtype == np.int32 and indices.tolist() == [[0, 2, 1]]
    assert scores.tolist() == [[13064500, 13064500, 13001000]]


def test_vectors_are_searched_in_single_precision():
    mesh = meshes.make_mesh(1)
    with jax.set_mesh(mesh):
        scores, _ = search(np.eye(4), np.eye(4), 1, mesh)
    assert scores.dtype == np.float32 and scores[:, 0].tolist() == [1.0] * 4
