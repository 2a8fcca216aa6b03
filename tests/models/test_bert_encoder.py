"""The encoder is BERT: equal to PyTorch in states and gradients, packed or not, on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from arcticjax.models.encoder import Encoder
from arcticjax.models.hf_mapping import from_hf_state, to_hf_state
from arcticjax.models.packing import segments_and_positions
from arcticjax.models.resolve import resolve
from arcticjax.models.spec import POOLINGS, PRESETS, ModelSpec, parameter_shapes

pytestmark = pytest.mark.usefixtures("quick_compiler")

SPEC = ModelSpec(
    vocab_size=60, hidden_size=32, num_layers=3, num_heads=4, intermediate_size=64, max_positions=24
)
ENCODER = Encoder(SPEC)

# Three rows of 24 tokens and 3 slots: full, with gaps and an empty slot, empty.
STARTS_RK = np.array([[0, 7, 20], [1, 9, 24], [24, 24, 24]], np.int32)
LENGTHS_RK = np.array([[7, 13, 4], [5, 12, 0], [0, 0, 0]], np.int32)
TOKENS_RS = np.random.default_rng(1).integers(0, 60, (3, 24)).astype(np.int32)
REAL_RK = LENGTHS_RK > 0


@pytest.fixture(scope="module")
def torch_model():
    return random_torch_model(SPEC, seed=0)


@pytest.fixture(scope="module")
def params(torch_model):
    return from_torch(SPEC, torch_model)


def random_torch_model(spec: ModelSpec, seed: int) -> transformers.BertModel:
    """A model whose every parameter matters: fresh ones have zero biases and unit scales."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(**(spec.to_hf() | {"attn_implementation": "eager"}))
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "LayerNorm" in name:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * (0.3 if parameter.ndim == 1 else 0.15))
    return model


def from_torch(spec: ModelSpec, model: transformers.BertModel) -> dict:
    return from_hf_state(spec, {k: v.detach().numpy() for k, v in model.state_dict().items()})


def texts() -> list[np.ndarray]:
    return [
        TOKENS_RS[row, start : start + length]
        for row, slots in enumerate(zip(STARTS_RK, LENGTHS_RK, strict=True))
        for start, length in zip(*slots, strict=True)
        if length
    ]


def torch_states(model: transformers.BertModel, tokens: np.ndarray) -> torch.Tensor:
    return model(input_ids=torch.tensor(tokens[None]).long()).last_hidden_state[0]


# Compiling is nearly all of what these tests cost: programs are shared and keep their shapes.
@jax.jit
def hidden(params, tokens_RS, starts_RK, lengths_RK):
    segments_RS, positions_RS = segments_and_positions(starts_RK, lengths_RK, tokens_RS.shape[1])
    return ENCODER.hidden(params, tokens_RS, segments_RS, positions_RS)


@functools.partial(jax.jit, static_argnames=("pooling", "dtype"))
def embed(params, tokens_RS, starts_RK, lengths_RK, *, pooling="mean", dtype="float32"):
    return ENCODER.embed(params, tokens_RS, starts_RK, lengths_RK, pooling=pooling, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("dtype", "remat"))
@jax.grad
def gradient(params, tokens_RS, starts_RK, lengths_RK, weights_RKD, **options):
    """Of a scalar that depends on every embedding."""
    vectors_RKD = ENCODER.embed(params, tokens_RS, starts_RK, lengths_RK, pooling="mean", **options)
    return (vectors_RKD * weights_RKD).sum()


def weights_RKD() -> np.ndarray:
    return np.random.default_rng(2).normal(size=(3, 3, SPEC.hidden_size)).astype(np.float32)


def assert_gradients_close(got: dict, expected: dict, tolerance: float):
    got, expected = flatten_dict(got, sep="/"), flatten_dict(expected, sep="/")
    assert got.keys() == expected.keys()
    for path in got:
        # softmax ignores a constant added to all scores: what is there is rounding
        if path == "layers/attention/key/bias":
            continue
        error = np.linalg.norm(np.asarray(got[path]) - np.asarray(expected[path]))
        size = np.linalg.norm(np.asarray(expected[path]))
        assert size > 0, path
        assert error <= tolerance * size, (path, error / size)


def test_parameters_have_the_stated_shapes_and_names():
    abstract = flatten_dict(ENCODER.abstract(), sep="/")
    assert {path: leaf.shape for path, leaf in abstract.items()} == parameter_shapes(SPEC)
    assert {leaf.dtype for leaf in abstract.values()} == {jnp.dtype("float32")}
    for spec in PRESETS.values():
        leaves = jax.tree.leaves(Encoder(spec).abstract())
        # a row that nothing reads: ModernBERT's first layer has no norm before its attention
        unused = spec.hidden_size if spec.family == "modernbert" else 0
        assert sum(leaf.size for leaf in leaves) - unused == spec.parameter_count()


def test_fresh_parameters_are_deterministic_and_distributed_as_stated():
    init = jax.jit(ENCODER.init)
    first, again, second = (
        jax.tree.map(np.asarray, init(jax.random.key(seed))) for seed in (0, 0, 1)
    )
    assert jax.tree.structure(first) == jax.tree.structure(ENCODER.abstract())
    first, again, second = (flatten_dict(params, sep="/") for params in (first, again, second))
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, again[path])
        if path.endswith("bias"):
            assert not leaf.any()
        elif path.endswith("scale"):
            assert (leaf == 1).all()
        else:
            assert (leaf != second[path]).mean() > 0.99
            assert abs(leaf.std() / SPEC.initializer_range - 1) < 0.15, path
    kernel = first["layers/mlp/up/kernel"]
    assert not np.isclose(kernel[0], kernel[1]).all()


def test_hidden_states_equal_torch(params, torch_model):
    got_RSD = np.asarray(hidden(params, TOKENS_RS, STARTS_RK, LENGTHS_RK))
    for row, slot in zip(*np.nonzero(REAL_RK), strict=True):
        place = slice(STARTS_RK[row, slot], STARTS_RK[row, slot] + LENGTHS_RK[row, slot])
        with torch.no_grad():
            expected_SD = torch_states(torch_model, TOKENS_RS[row, place]).numpy()
        np.testing.assert_allclose(got_RSD[row, place], expected_SD, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 1, "num_layers": 1},
        {"hidden_size": 48, "num_heads": 2, "intermediate_size": 40, "type_vocab_size": 1},
        {"layer_norm_epsilon": 1e-2},
    ],
)
def test_other_shapes_equal_torch(change: dict):
    spec = dataclasses.replace(SPEC, **change)
    model = random_torch_model(spec, seed=3)
    ones_RS = np.ones((1, 24), np.int32)
    got_RSD = jax.jit(Encoder(spec).hidden)(
        from_torch(spec, model), TOKENS_RS[:1], ones_RS, np.arange(24, dtype=np.int32)[None]
    )
    with torch.no_grad():
        expected_SD = torch_states(model, TOKENS_RS[0]).numpy()
    np.testing.assert_allclose(got_RSD[0], expected_SD, atol=1e-5)


def test_real_minilm_equals_torch():
    spec = PRESETS["xs"]
    folder = resolve("sentence-transformers/all-MiniLM-L6-v2")
    params = from_hf_state(spec, load_file(folder / "model.safetensors"))
    config = transformers.BertConfig(**spec.to_hf())
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    state = {name: torch.tensor(array) for name, array in to_hf_state(spec, params).items()}
    loaded = model.load_state_dict(state, strict=False)
    assert not loaded.missing_keys and not loaded.unexpected_keys
    tokens_RS = np.random.default_rng(0).integers(1000, 30000, (1, 64)).astype(np.int32)
    segments_RS, positions_RS = segments_and_positions(
        jnp.array([[0, 20]]), jnp.array([[20, 44]]), 64
    )
    got_RSD = np.asarray(
        jax.jit(Encoder(spec).hidden)(params, tokens_RS, segments_RS, positions_RS)
    )
    for place in (slice(0, 20), slice(20, 64)):
        with torch.no_grad():
            expected_SD = torch_states(model, tokens_RS[0, place]).numpy()
        np.testing.assert_allclose(got_RSD[0, place], expected_SD, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_packed_rows_equal_one_text_per_row(params, pooling: str):
    packed_RKD = np.asarray(embed(params, TOKENS_RS, STARTS_RK, LENGTHS_RK, pooling=pooling))
    alone_TD = []
    for tokens in texts():
        tokens_RS, lengths_RK = np.zeros_like(TOKENS_RS), np.zeros_like(LENGTHS_RK)
        tokens_RS[0, : len(tokens)] = tokens
        lengths_RK[0, 0] = len(tokens)
        vectors_RKD = embed(
            params, tokens_RS, np.zeros_like(STARTS_RK), lengths_RK, pooling=pooling
        )
        alone_TD.append(np.asarray(vectors_RKD)[0, 0])
    np.testing.assert_allclose(packed_RKD[REAL_RK], alone_TD, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(packed_RKD[REAL_RK], axis=-1), 1, atol=1e-6)
    assert not packed_RKD[~REAL_RK].any()


def test_a_change_in_one_text_or_in_padding_moves_no_other(params):
    before_RSD = np.asarray(hidden(params, TOKENS_RS, STARTS_RK, LENGTHS_RK))
    changed_RS = TOKENS_RS.copy()
    changed_RS[0, 7:20] = (changed_RS[0, 7:20] + 1) % 60  # the second text of row 0
    changed_RS[1, [0, 6, 7, 8, 21, 23]] += 1  # padding of row 1
    after_RSD = np.asarray(hidden(params, changed_RS, STARTS_RK, LENGTHS_RK))
    moved_RS = (before_RSD != after_RSD).any(-1)
    assert moved_RS[0, 7:20].all()
    assert not moved_RS[0, :7].any() and not moved_RS[0, 20:].any()
    assert not moved_RS[1, 1:6].any() and not moved_RS[1, 9:21].any()
    assert not moved_RS[2].any()


def test_gradients_equal_torch(params, torch_model):
    weights = weights_RKD()
    got = gradient(params, TOKENS_RS, STARTS_RK, LENGTHS_RK, weights)
    torch_model.zero_grad()
    loss = torch.zeros(())
    for tokens, weight_D in zip(texts(), weights[REAL_RK], strict=True):
        vector_D = torch_states(torch_model, tokens).mean(0)
        unit_D = torch.nn.functional.normalize(vector_D, dim=0)
        loss = loss + (unit_D * torch.tensor(weight_D)).sum()
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in torch_model.named_parameters()}
    assert_gradients_close(got, from_hf_state(SPEC, gradients), 1e-4)


def test_gradients_of_rows_without_texts_are_zero(params):
    nothing = np.full_like(STARTS_RK, 24), np.zeros_like(LENGTHS_RK)
    for path, leaf in flatten_dict(gradient(params, TOKENS_RS, *nothing, weights_RKD())).items():
        assert (np.asarray(leaf) == 0).all(), path


def test_recomputing_layers_changes_no_gradient(params):
    arguments = (params, TOKENS_RS, STARTS_RK, LENGTHS_RK, weights_RKD())
    assert "remat" not in str(gradient.trace(*arguments).jaxpr)
    wanted = gradient(*arguments)
    for remat in ("named", "full"):
        assert "remat" in str(gradient.trace(*arguments, remat=remat).jaxpr)
        assert_gradients_close(gradient(*arguments, remat=remat), wanted, 1e-5)


def test_bfloat16_is_near_float32(params):
    arguments = (params, TOKENS_RS, STARTS_RK, LENGTHS_RK)
    states = jax.eval_shape(
        functools.partial(ENCODER.hidden, dtype="bfloat16"), params, *[TOKENS_RS] * 3
    )
    assert states.dtype == jnp.bfloat16
    exact_RKD, rounded_RKD = (
        np.asarray(embed(*arguments, dtype=dtype)) for dtype in ("float32", "bfloat16")
    )
    assert rounded_RKD.dtype == np.float32
    assert (np.einsum("RKD,RKD->RK", exact_RKD, rounded_RKD)[REAL_RK] > 0.9995).all()
    assert not np.array_equal(exact_RKD, rounded_RKD)
    exact, rounded = (
        gradient(*arguments, weights_RKD(), dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {jnp.dtype("float32")}
    assert_gradients_close(rounded, exact, 0.1)


def test_an_id_or_position_past_its_table_is_not_a_number(params):
    tokens_RS, positions_RS = TOKENS_RS.copy(), np.tile(np.arange(24, dtype=np.int32), (3, 1))
    tokens_RS[0, 3] = SPEC.vocab_size
    positions_RS[1, 23] = SPEC.max_positions
    states_RSD = jax.jit(ENCODER.hidden)(params, tokens_RS, np.ones_like(tokens_RS), positions_RS)
    assert np.isnan(states_RSD).all(-1).any(-1).tolist() == [True, True, False]


def test_the_program_does_not_grow_with_depth():
    def size(layers: int) -> int:
        encoder = Encoder(dataclasses.replace(SPEC, num_layers=layers))
        integers = jax.ShapeDtypeStruct((3, 24), jnp.int32)
        return len(
            jax.jit(encoder.hidden)
            .lower(encoder.abstract(), integers, integers, integers)
            .as_text()
        )

    assert abs(size(12) - size(2)) < 0.02 * size(2)


def test_gradients_in_a_shard_map_over_eight_devices(params):
    """As the training step does it: parameters cast to varying, one reduction at the end."""
    axes = ("data", "fsdp")
    mesh = jax.make_mesh((4, 2), axes, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    shards = [
        (np.roll(TOKENS_RS, device, 0), STARTS_RK, LENGTHS_RK, np.roll(weights_RKD(), device, 2))
        for device in range(8)
    ]
    expected = jax.tree.map(
        lambda *leaves: np.sum(leaves, axis=0), *[gradient(params, *shard) for shard in shards]
    )

    def local(params, *batch, **options):
        varying = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axes, to="varying"), params)
        return jax.lax.psum(gradient(varying, *batch, **options), axes)

    def step(**options):
        batch = PartitionSpec(axes)
        return jax.jit(
            jax.shard_map(
                functools.partial(local, **options),
                in_specs=(PartitionSpec(), batch, batch, batch, batch),
                out_specs=PartitionSpec(),
                check_vma=True,
            )
        )

    arrays = [np.concatenate(column) for column in zip(*shards, strict=True)]
    with jax.set_mesh(mesh):
        assert_gradients_close(step()(params, *arrays), expected, 1e-5)
        # varying types are checked while tracing
        for options in ({"remat": "full"}, {"dtype": "bfloat16"}):
            step(**options).trace(params, *arrays)
