"""The mapping table is a bijection, and says what does not fit."""

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from arcticjax.errors import CheckpointError
from arcticjax.models.families import FAMILIES
from arcticjax.models.hf_mapping import from_hf_state, to_hf_state
from arcticjax.models.resolve import resolve
from arcticjax.models.spec import PRESETS, ModelSpec, parameter_shapes

SPEC = ModelSpec(
    vocab_size=20, hidden_size=8, num_layers=3, num_heads=2, intermediate_size=12, max_positions=10
)


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    params = {
        path: random.normal(size=shape).astype(np.float32)
        for path, shape in parameter_shapes(SPEC).items()
    }
    nested: dict = {}
    for path, array in params.items():
        node = nested
        *parents, leaf = path.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return to_hf_state(SPEC, nested)


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        assert got[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_the_table_covers_every_parameter_once():
    table = FAMILIES["bert"].native.table
    paths = [path for entry in table for path in entry.paths]
    assert sorted(paths) == sorted(parameter_shapes(SPEC))
    assert len({entry.hf_name for entry in table}) == len(table)


def test_round_trip_is_bit_equal(tensors):
    params = from_hf_state(SPEC, tensors)
    assert_same(to_hf_state(SPEC, params), tensors)
    assert_same(to_hf_state(SPEC, jax.tree.map(jax.numpy.asarray, params)), tensors)
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())


def test_real_weights_round_trip_bit_equal():
    folder = resolve("sentence-transformers/all-MiniLM-L6-v2")
    stored = load_file(folder / "model.safetensors")
    written = to_hf_state(PRESETS["xs"], from_hf_state(PRESETS["xs"], stored))
    dropped = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    assert_same(written, {name: stored[name] for name in stored.keys() - dropped})


def test_prefix_heads_pooler_and_old_norm_names_are_understood(tensors):
    foreign = {"bert." + name: tensor for name, tensor in tensors.items()}
    foreign = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in foreign.items()
    }
    foreign["bert.embeddings.position_ids"] = np.arange(10)[None]
    foreign["bert.pooler.dense.weight"] = np.zeros((8, 8), np.float32)
    foreign["bert.pooler.dense.bias"] = np.zeros(8, np.float32)
    foreign["cls.predictions.bias"] = np.zeros(20, np.float32)
    assert_same(to_hf_state(SPEC, from_hf_state(SPEC, foreign)), tensors)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_float_types_become_float32(tensors, dtype):
    params = from_hf_state(SPEC, {name: tensor.astype(dtype) for name, tensor in tensors.items()})
    for leaf in flatten_dict(params).values():
        assert leaf.dtype == np.float32
    expected = tensors["embeddings.word_embeddings.weight"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(params["embeddings"]["token"], expected)


def test_everything_that_does_not_fit_is_named(tensors):
    del tensors["encoder.layer.1.attention.self.key.bias"]
    tensors["encoder.layer.3.output.dense.bias"] = np.zeros(8, np.float32)
    tensors["embeddings.word_embeddings.weight"] = np.zeros((19, 8), np.float32)
    tensors["encoder.layer.0.output.dense.weight"] = np.zeros((8, 12), np.int8)
    with pytest.raises(CheckpointError) as caught:
        from_hf_state(SPEC, tensors)
    message = str(caught.value)
    assert "1 missing: encoder.layer.1.attention.self.key.bias (8,)" in message
    assert "1 unexpected: encoder.layer.3.output.dense.bias" in message
    assert (
        "embeddings.word_embeddings.weight is float32 (19, 8), expected floats (20, 8)" in message
    )
    assert "encoder.layer.0.output.dense.weight is int8" in message


def test_two_names_for_one_tensor_are_refused(tensors):
    tensors["bert.embeddings.LayerNorm.weight"] = tensors["embeddings.LayerNorm.weight"]
    with pytest.raises(CheckpointError, match=r"stands beside embeddings\.LayerNorm\.weight"):
        from_hf_state(SPEC, tensors)


def test_writing_foreign_parameters_is_refused(tensors):
    params = from_hf_state(SPEC, tensors)
    params["embeddings"]["token"] = params["embeddings"]["token"][:5]
    del params["layers"]["mlp"]["norm"]["bias"]
    params["head"] = np.zeros(3)
    with pytest.raises(CheckpointError) as caught:
        to_hf_state(SPEC, params)
    message = str(caught.value)
    assert "embeddings/token is (5, 8), expected (20, 8)" in message
    assert "layers/mlp/norm/bias is missing, expected (3, 8)" in message
    assert "head is (3,), expected nothing" in message
