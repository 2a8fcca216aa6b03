"""Embedding texts on the mesh, against one text at a time."""

import dataclasses

import jax
import numpy as np
import pytest

from arcticjax.config import TextContract
from arcticjax.models.encoder import Encoder
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.parallel import mesh as meshes
from arcticjax.step.embedder import Embedder
from arcticjax.step.encode import make_encode
from tests import tiny

CONTRACT = TextContract("river stone ", "", 12, 32, "mean")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    encoder = Encoder(tiny.SPEC)
    params = tiny.weights(seed=1)
    folder = tiny.tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))
    return encoder, params, TextTokenizer.from_file(folder)


def embedder(made, devices, rows=2):
    encoder, params, tokenizer = made
    mesh = meshes.make_mesh(devices)
    return Embedder(encoder, meshes.replicate(mesh, params), tokenizer, CONTRACT, mesh, rows=rows)


def one_by_one(made, texts, side):
    """Start token, prompt, text cut to the cap, end token, each text in a row of its own."""
    encoder, params, tokenizer = made
    prompt = tokenizer.encode([CONTRACT.query_prompt])[0].tolist() if side == "query" else []
    longest = CONTRACT.query_length if side == "query" else CONTRACT.document_length
    embed = jax.jit(lambda params, *rows: encoder.embed(params, *rows, pooling="mean"))
    vectors = []
    for ids in tokenizer.encode(texts):
        own = ids[: longest - 2 - len(prompt)].tolist()
        tokens = [tokenizer.start_id, *prompt, *own, tokenizer.end_id]
        row = np.zeros((1, 32), np.int32)
        row[0, : len(tokens)] = tokens
        vectors.append(
            embed(params, row, np.zeros((1, 1), int), np.full((1, 1), len(tokens)))[0, 0]
        )
    return np.array(vectors)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("side", ["query", "document"])
def test_packed_vectors_equal_those_of_single_texts_in_order(made, devices, side):
    random = np.random.default_rng(2)
    texts = [" ".join(random.choice(tiny.WORDS, n)) for n in random.integers(0, 45, 60)]
    found = embedder(made, devices).encode(texts, side)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, one_by_one(made, texts, side), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_blocks_on_several_devices_of_a_cpu_wait_for_one_another(made, monkeypatch):
    texts, begun, waited = ["river stone fern"] * 500, [], []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    embedder(made, 8).encode(texts, "document", encoded=begun.append)
    assert sum(begun) == 500 and len(waited) == len(begun) > 3


def test_truncated_vectors_have_unit_length(made):
    one = embedder(made, 1)
    whole, cut = one.encode(["river"]), one.encode(["river"], dimension=8)
    np.testing.assert_allclose(cut[0], whole[0, :8] / np.linalg.norm(whole[0, :8]), atol=1e-6)


def test_no_texts(made):
    assert embedder(made, 1).encode([]).shape == (0, 32)


def test_wrong_arguments(made):
    one = embedder(made, 1)
    with pytest.raises(ValueError, match="neither 'query' nor 'document'"):
        one.encode(["river"], "passage")
    with pytest.raises(ValueError, match=r"33 is not in 1\.\.32"):
        one.encode(["river"], dimension=33)
    for dimension in ("8", 8.0):
        with pytest.raises(ValueError, match="is not a whole number"):
            one.encode(["river"], dimension=dimension)
    with pytest.raises(ValueError, match=r"write \[text\]"):
        one.encode("river")
    with pytest.raises(ValueError, match="expected text, got"):
        one.encode([("river", "stone")])
    with pytest.raises(ValueError, match="neither 'query' nor 'document'"):
        one.encode(["river"], ["query"])


def test_equal_encoders_share_a_program():
    """An export embeds as trained and as its folder says: what is equal compiles once."""
    mesh = meshes.make_mesh(1)
    copy = Encoder(dataclasses.replace(tiny.SPEC))
    first = make_encode(Encoder(tiny.SPEC), mesh, pooling="mean")
    assert make_encode(copy, meshes.make_mesh(1), pooling="mean") is first
    assert make_encode(copy, mesh, pooling="cls") is not first
