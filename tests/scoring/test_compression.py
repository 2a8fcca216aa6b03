"""Compressed vectors: the published quantiser, integers, and search among codes."""

import jax
import numpy as np
import pytest

from arcticjax.errors import ConfigError
from arcticjax.parallel import mesh as meshes
from arcticjax.scoring import compression
from arcticjax.scoring.compression import Compression


def unit_vectors(count, dimension, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("bits, limit, levels", [(8, 0.30, 256), (4, 0.18, 16)])
def test_codes_are_the_published_ones(bits, limit, levels):
    step = 2 * limit / (levels - 1)
    values = np.array([[-1.0, -limit, -limit + 2.4 * step, 0.49 * step - limit, limit, 1.0]])
    codes = compression.quantize(values.astype(np.float32), bits)
    assert codes.tolist() == [[0, 0, 2, 0, levels - 1, levels - 1]]
    inside = np.random.default_rng(1).uniform(-limit, limit, (20, 30)).astype(np.float32)
    back = compression.dequantize(compression.quantize(inside, bits), bits)
    assert np.abs(back - inside).max() <= step / 2 + 1e-6


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dimension", [7, 256])
def test_products_of_integers_are_those_of_the_values(bits, dimension):
    queries, documents = unit_vectors(5, dimension), unit_vectors(9, dimension, 1)
    codes = [compression.quantize(vectors, bits) for vectors in (queries, documents)]
    values = [one * compression.step(bits) - compression.LIMITS[bits] for one in codes]
    wanted = values[0] @ values[1].T
    np.testing.assert_allclose(
        compression.integer_products(*codes, bits), wanted, rtol=0, atol=1e-12
    )
    kept = [Compression(bits=bits).keep(vectors) for vectors in (queries, documents)]
    products = np.asarray(compression.odd_products(*kept))
    assert products.dtype == np.int32
    np.testing.assert_allclose(
        products * compression.step(bits) ** 2 / 4, wanted, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", ["int8", "int4", "int8@12", "float32@12"])
def test_search_is_by_the_products(devices, name):
    queries, documents = unit_vectors(6, 32), unit_vectors(101, 32, 1)
    one = Compression.parse(name)
    mesh = meshes.make_mesh(devices)
    with jax.set_mesh(mesh):
        scores, places = one.search(one.keep(queries), one.keep(documents), 10, mesh)
    cut = [compression.truncate(vectors, one.dimension) for vectors in (queries, documents)]
    if one.bits == 32:
        wanted = cut[0] @ cut[1].T
    else:
        codes = [compression.quantize(vectors, one.bits) for vectors in cut]
        wanted = compression.integer_products(*codes, one.bits)
    order = np.argsort(-wanted.round(9), axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(places, order)
    np.testing.assert_allclose(scores, np.take_along_axis(wanted, order, axis=1), atol=2e-7)


@pytest.mark.parametrize("dimension", [6, 7])
def test_four_bit_codes_share_bytes(dimension):
    codes = np.random.default_rng(0).integers(0, 16, (3, dimension)).astype(np.uint8)
    packed = compression.pack(codes)
    assert packed.shape == (3, 4 if dimension == 7 else 3)
    np.testing.assert_array_equal(compression.unpack(packed, dimension), codes)
    assert Compression(bits=4).bytes_per_vector(dimension) == packed.shape[1]


def test_bytes_are_those_published():
    published = {"float32": 3072, "int8": 768, "int8@256": 256, "int4@256": 128}
    assert {name: Compression.parse(name).bytes_per_vector(768) for name in published} == published
    assert [str(Compression.parse(name)) for name in published] == list(published)


def test_truncated_vectors_have_unit_length():
    vectors = unit_vectors(4, 10)
    cut = compression.truncate(vectors, 3)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(cut[:, 0] / cut[:, 1], vectors[:, 0] / vectors[:, 1], rtol=1e-5)
    with pytest.raises(ConfigError, match="11 dimensions: the model's vectors have 10"):
        compression.truncate(vectors, 11)


@pytest.mark.parametrize("name", ["int2", "int8@", "int8@0", "8", "int8@-3"])
def test_unknown_kinds_are_refused(name):
    with pytest.raises(ConfigError, match="expected float32, int8 or int4"):
        Compression.parse(name)
