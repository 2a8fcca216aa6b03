"""Every family is what transformers computes: states and gradients, packed or not, names and
sizes."""

import dataclasses
import functools
import json
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from arcticjax.errors import CheckpointError, ConfigError
from arcticjax.models.encoder import Encoder
from arcticjax.models.families import FAMILIES
from arcticjax.models.hf_mapping import from_hf_state, to_hf_state, to_original_config
from arcticjax.models.packing import segments_and_positions
from arcticjax.models.spec import PRESETS, ModelSpec, Rotary, parameter_shapes
from tests.models.family_specs import SPECS, from_torch, state_of, torch_model

pytestmark = pytest.mark.usefixtures("quick_compiler")

# Rows of 48: one text of the whole row; three with gaps between; one short and one past 24 tokens.
STARTS_RK = np.array([[0, 48, 48], [1, 9, 30], [0, 7, 48]], np.int32)
LENGTHS_RK = np.array([[48, 0, 0], [7, 19, 18], [3, 40, 0]], np.int32)
TOKENS_RS = np.random.default_rng(1).integers(2, 120, (3, 48)).astype(np.int32)
WEIGHTS_RSD = np.random.default_rng(2).normal(size=(3, 48, 32)).astype(np.float32)


def places():
    """Row and slice of every text."""
    for row, slot in zip(*np.nonzero(LENGTHS_RK), strict=True):
        yield row, slice(STARTS_RK[row, slot], STARTS_RK[row, slot] + LENGTHS_RK[row, slot])


def flat(params) -> dict[str, Any]:
    return cast("dict[str, Any]", flatten_dict(params, sep="/"))


# Compiling is nearly all of what these tests cost: one program for each family.
@functools.partial(jax.jit, static_argnames="spec")
def hidden_and_gradient(spec, params, tokens_RS):
    """States, and the gradient of a scalar that depends on every state of a text."""
    segments_RS, positions_RS = segments_and_positions(
        jnp.asarray(STARTS_RK), jnp.asarray(LENGTHS_RK), tokens_RS.shape[1]
    )

    def scalar(params):
        states_RSD = Encoder(spec).hidden(params, tokens_RS, segments_RS, positions_RS)
        real_RS1 = (segments_RS > 0)[:, :, None]
        return jnp.where(real_RS1, states_RSD * WEIGHTS_RSD, 0).sum(), states_RSD

    (_, states_RSD), gradient = jax.value_and_grad(scalar, has_aux=True)(params)
    return states_RSD, gradient


@functools.partial(jax.jit, static_argnames=("spec", "dtype"))
def embed(spec, params, dtype):
    tokens_RS, starts_RK, lengths_RK = map(jnp.asarray, (TOKENS_RS, STARTS_RK, LENGTHS_RK))
    return Encoder(spec).embed(
        params, tokens_RS, starts_RK, lengths_RK, pooling="mean", dtype=dtype, remat="named"
    )


@pytest.fixture(scope="module", params=SPECS)
def case(request):
    """(spec, transformers' model, parameters)"""
    spec = SPECS[request.param]
    model = torch_model(spec)
    return spec, model, from_torch(spec, model)


def test_states_and_gradients_equal_torch(case):
    spec, model, params = case
    states_RSD, gradient = hidden_and_gradient(spec, params, TOKENS_RS)
    model.zero_grad()
    total = torch.zeros(())
    # short before long: transformers keeps the frequencies of the longest text it has seen
    for row, place in sorted(places(), key=lambda one: one[1].stop - one[1].start):
        expected_SD = model(input_ids=torch.tensor(TOKENS_RS[row : row + 1, place]).long())[0][0]
        np.testing.assert_allclose(
            states_RSD[row, place], expected_SD.detach().numpy(), atol=1e-5, err_msg=str(place)
        )
        total = total + (expected_SD * torch.tensor(WEIGHTS_RSD[row, place])).sum()
    total.backward()
    wanted = {
        name: np.zeros(parameter.shape, np.float32)
        if parameter.grad is None
        else parameter.grad.numpy()
        for name, parameter in model.named_parameters()
    }
    wanted = flat(from_hf_state(spec, wanted))
    for path, got in flat(gradient).items():
        expected = wanted[path]
        if path == "layers/attention/norm/scale" and spec.family == "modernbert":
            assert not np.asarray(got[0]).any()  # nothing reads it
            got, expected = got[1:], expected[1:]
        # softmax ignores a constant added to all scores: what is there is rounding
        if path == "layers/attention/key/bias" and spec.family == "xlm-roberta":
            continue
        size = np.linalg.norm(expected)
        assert size > 0, path
        assert np.linalg.norm(got - expected) <= 1e-4 * size, path


def test_padded_batches_equal_torch(case):
    spec, model, params = case
    states_RSD, _ = hidden_and_gradient(spec, params, TOKENS_RS)
    # of lengths that do not reach the scaling, which in transformers hangs on the longest text
    texts = [(row, place) for row, place in places() if place.stop - place.start < 24]
    padded = np.full((len(texts), 22), spec.pad_token_id)
    mask = np.zeros_like(padded)
    for index, (row, place) in enumerate(texts):
        length = place.stop - place.start
        padded[index, :length], mask[index, :length] = TOKENS_RS[row, place], 1
    with torch.no_grad():
        found = model(input_ids=torch.tensor(padded), attention_mask=torch.tensor(mask))[0].numpy()
    for index, (row, place) in enumerate(texts):
        own = found[index, : place.stop - place.start]
        np.testing.assert_allclose(states_RSD[row, place], own, atol=1e-5)


def test_a_change_in_one_text_or_in_padding_moves_no_other(case):
    spec, _, params = case
    changed_RS = TOKENS_RS.copy()
    changed_RS[1, 9:28] = (changed_RS[1, 9:28] - 1) % 118 + 2  # the second text of row 1
    changed_RS[1, [0, 8, 28, 29]] = 5  # padding of row 1
    changed_RS[2, 47] = 5
    before_RSD, after_RSD = (
        np.asarray(hidden_and_gradient(spec, params, tokens)[0])
        for tokens in (TOKENS_RS, changed_RS)
    )
    moved_RS = (before_RSD != after_RSD).any(-1)
    assert moved_RS[1, 9:28].all()
    for row, place in places():
        assert (row, place.start) == (1, 9) or not moved_RS[row, place].any()


def test_a_window_bounds_what_a_token_sees():
    """With windows in all layers but the first, whose output is taken away."""
    spec = dataclasses.replace(SPECS["modernbert"], num_layers=2)
    params = from_torch(spec, torch_model(spec))
    params["layers"]["attention"]["output"]["kernel"][0] = 0
    changed_RS = TOKENS_RS.copy()
    changed_RS[0, 20] = (changed_RS[0, 20] - 1) % 118 + 2
    before, after = (
        np.asarray(hidden_and_gradient(spec, params, tokens)[0][0])
        for tokens in (TOKENS_RS, changed_RS)
    )
    moved = np.flatnonzero((before != after).any(-1))
    assert moved.tolist() == list(range(15, 26))


def test_bfloat16_is_within_a_hundredth(case):
    spec, _, params = case
    exact, rounded = (np.asarray(embed(spec, params, dtype)) for dtype in ("float32", "bfloat16"))
    assert 0 < np.abs(exact - rounded).max() <= 1e-2


def test_names_are_those_of_transformers(case):
    spec, model, params = case
    state = state_of(model)
    written = to_hf_state(spec, params)
    assert {name for name in state if not name.startswith("pooler.")} == written.keys()
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, state[name], err_msg=name)
    table = FAMILIES[spec.family].native.table
    paths = [path for entry in table for path in entry.paths]
    assert sorted(paths) == sorted(parameter_shapes(spec))


def test_config_round_trips(case):
    spec, _, _ = case
    for written in (spec.to_hf(), dataclasses.replace(spec, initializer_range=0.01).to_hf()):
        again = ModelSpec.from_hf(json.loads(json.dumps(written)))
        assert dataclasses.replace(again, initializer_range=0.02) == spec


@pytest.mark.parametrize("family", ["nomic_bert", "gte"])
def test_original_names_are_what_transformers_takes_for_them(family, tmp_path):
    """transformers has its own table from the original names to its own."""
    spec = SPECS[family]
    params = from_torch(spec, torch_model(spec))
    original = to_hf_state(spec, params, original=True)
    assert not to_hf_state(spec, params).keys() & {n for n in original if "layer" in n}
    save_file(original, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(spec.to_hf()))
    loaded = state_of(transformers.AutoModel.from_pretrained(tmp_path))
    for name, tensor in to_hf_state(spec, params).items():
        np.testing.assert_array_equal(loaded[name], tensor, err_msg=name)


@pytest.mark.parametrize("prefix", ["", "bert.", "new."])
@pytest.mark.parametrize("family", ["nomic_bert", "gte"])
def test_original_checkpoints_are_read(family, prefix):
    spec = SPECS[family]
    params = from_torch(spec, torch_model(spec))
    tensors = {
        prefix + name: tensor for name, tensor in to_hf_state(spec, params, original=True).items()
    }
    if prefix == ("new." if family == "nomic_bert" else "bert."):
        with pytest.raises(CheckpointError, match="missing"):
            from_hf_state(spec, tensors)
        return
    jax.tree.map(np.testing.assert_array_equal, from_hf_state(spec, tensors), params)
    config = to_original_config(spec) | {"auto_map": {"AutoModel": "other/repo--modeling.Model"}}
    found = ModelSpec.from_hf(json.loads(json.dumps(config)))
    assert found.rotary is not None and spec.rotary is not None
    numbers = [dataclasses.astuple(one) for one in (found.rotary, spec.rotary)]
    assert numbers[0] == pytest.approx(numbers[1])
    assert dataclasses.replace(found, rotary=spec.rotary) == spec


def test_families_with_one_form_have_no_other():
    with pytest.raises(ConfigError, match="no names but those of transformers"):
        to_original_config(PRESETS["xs"])


# The content of config.json as published with the models.
NOMIC = {
    "activation_function": "swiglu",
    "auto_map": {"AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"},
    "causal": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-12,
    "max_trained_positions": 2048,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "model_type": "nomic_bert",
    "n_embd": 768,
    "n_head": 12,
    "n_inner": 3072,
    "n_layer": 12,
    "n_positions": 8192,
    "parallel_block": False,
    "prenorm": False,
    "qkv_proj_bias": False,
    "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": 2,
    "type_vocab_size": 2,
    "use_rms_norm": False,
    "vocab_size": 30528,
}
GTE = {
    "auto_map": {"AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel"},
    "hidden_act": "gelu",
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "layer_norm_type": "layer_norm",
    "logn_attention_scale": False,
    "max_position_embeddings": 8192,
    "model_type": "new",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pack_qkv": True,
    "pad_token_id": 1,
    "position_embedding_type": "rope",
    "rope_scaling": {"factor": 8.0, "type": "ntk"},
    "rope_theta": 20000,
    "type_vocab_size": 1,
    "vocab_size": 250048,
}


def test_published_configs_are_read():
    assert ModelSpec.from_hf(NOMIC) == PRESETS["m-long"]
    short = ModelSpec.from_hf(NOMIC | {"rotary_scaling_factor": None})
    assert (short.max_positions, short.rotary) == (2048, Rotary(1000.0))
    scaled = Rotary(160_000.0, divisor=8 ** (2 / 64))
    assert ModelSpec.from_hf(GTE) == dataclasses.replace(PRESETS["m-v2"], rotary=scaled)
    plain = GTE | {"model_type": "gte", "rope_scaling": None, "rope_theta": 160000}
    assert ModelSpec.from_hf(plain) == PRESETS["m-v2"]
    modern = json.loads(transformers.ModernBertConfig().to_json_string(use_diff=False))
    assert ModelSpec.from_hf(modern) == PRESETS["modernbert-base"]
    older = PRESETS["modernbert-large"].to_hf()
    assert "layer_types" not in older
    assert ModelSpec.from_hf(older) == PRESETS["modernbert-large"]


@pytest.mark.parametrize(
    ("config", "change", "word"),
    [
        (NOMIC, {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        (NOMIC, {"qkv_proj_bias": None}, "qkv_proj_bias"),
        (NOMIC, {"prenorm": True}, "prenorm is True"),
        (NOMIC, {"num_experts": 8}, "num_experts is 8"),
        (NOMIC, {"rotary_emb_fraction": 0.5}, "rotary_emb_fraction"),
        (NOMIC, {"n_head": 5}, "not a multiple"),
        (NOMIC, {"n_layer": 0}, "n_layer is 0"),
        (GTE, {"position_embedding_type": "absolute"}, "position_embedding_type"),
        (GTE, {"logn_attention_scale": True}, "logn_attention_scale"),
        (GTE, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn', known are default"),
        (GTE, {"rope_scaling": {"type": "ntk"}}, "factor is 0"),
        (GTE, {"rope_scaling": "ntk"}, "rope_scaling"),
        (GTE, {"type_vocab_size": -1}, "type_vocab_size"),
        (PRESETS["modernbert-base"].to_hf(), {"norm_bias": True}, "norm_bias"),
        (PRESETS["modernbert-base"].to_hf(), {"rope_parameters": [1]}, "rope_parameters is"),
        (PRESETS["modernbert-base"].to_hf(), {"rope_scaling": {"type": "ntk"}}, "rope_scaling"),
        (PRESETS["modernbert-base"].to_hf(), {"layer_types": ["full_attention"]}, "layer_types"),
        (PRESETS["modernbert-base"].to_hf(), {"auto_map": {"AutoModel": "evil.M"}}, "auto_map"),
        (PRESETS["l-v2"].to_hf(), {"auto_map": {"AutoModel": "evil.M"}}, "auto_map"),
        (PRESETS["l-v2"].to_hf(), {"max_position_embeddings": 2}, "max_positions is 0"),
        (PRESETS["l-v2"].to_hf(), {"pad_token_id": -1}, "pad_token_id"),
    ],
)
def test_what_is_not_computed_is_refused(config, change, word):
    with pytest.raises(CheckpointError, match=word):
        ModelSpec.from_hf(config | change)


def test_layer_types_say_the_pattern():
    config = PRESETS["modernbert-base"].to_hf()
    types = ["full_attention", "sliding_attention"] * 11
    window = ModelSpec.from_hf(config | {"layer_types": types}).window
    assert window is not None and window.every == 2


def test_checkpoints_with_heads_and_poolers_are_read(case):
    spec, _, params = case
    family = FAMILIES[spec.family]
    tensors = {family.prefix + name: tensor for name, tensor in to_hf_state(spec, params).items()}
    for name in ("pooler.dense.weight", "lm_head.bias", "cls.bias", "head.dense.weight"):
        if name.startswith(family.unused):
            tensors[name] = np.zeros(3, np.float32)
    jax.tree.map(np.testing.assert_array_equal, from_hf_state(spec, tensors), params)
    with pytest.raises(CheckpointError, match=r"unexpected: other\.weight"):
        from_hf_state(spec, tensors | {"other.weight": np.zeros(3, np.float32)})


# Tokens of the long text: all that BERT takes; of m-long, past the trained positions.
LONG = {"xs": 512, "s": 512, "m": 512, "l": 512, "m-long": 2200}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "preset", ["xs", "s", "m", "l", "m-long", "m-v2", "l-v2", "modernbert-base"]
)
def test_true_shapes_equal_torch(preset):
    """Vectors of a short and a long text packed in a row, and of a short and a middling one padded,
    by both sides; random weights of the true shape."""
    spec = PRESETS[preset]
    model = torch_model(spec, deviation=0.03)
    params = from_torch(spec, model)
    tokens = np.random.default_rng(0).integers(2, 30_000, 3000).astype(np.int32)
    embed = jax.jit(functools.partial(Encoder(spec).embed, pooling="mean"))

    def torch_vectors(tokens_RS, lengths):
        mask_RS = torch.arange(tokens_RS.shape[1]) < torch.tensor(lengths)[:, None]
        with torch.no_grad():
            states_RSD = model(torch.tensor(tokens_RS).long(), attention_mask=mask_RS.long())[0]
        sums_RD = (states_RSD * mask_RS[:, :, None]).sum(1)
        return torch.nn.functional.normalize(sums_RD, dim=1).numpy()

    # padded before long: transformers keeps the frequencies of the longest text it has seen
    short, middling, long = 30, 450, LONG.get(preset, 700)
    padded_RS = np.full((2, middling), spec.pad_token_id, np.int32)
    padded_RS[0, :short], padded_RS[1] = tokens[:short], tokens[short : short + middling]
    got_RD = embed(params, padded_RS, np.array([[0], [0]]), np.array([[short], [middling]]))[:, 0]
    differences = {"padded": np.abs(got_RD - torch_vectors(padded_RS, [short, middling])).max()}
    packed_RS = tokens[None, : short + long]
    got_KD = embed(params, packed_RS, np.array([[0, short]]), np.array([[short, long]]))[0]
    for got_D, place in ((got_KD[0], slice(0, short)), (got_KD[1], slice(short, short + long))):
        alone_RS = packed_RS[:, place]
        size = alone_RS.shape[1]
        differences[f"{size} tokens"] = np.abs(got_D - torch_vectors(alone_RS, [size])[0]).max()
    print(preset, *(f"{name}: {value:.1e}" for name, value in differences.items()), sep=", ")
    assert max(differences.values()) <= 1e-5


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("preset", ["m-long", "modernbert-base"])
def test_true_lengths_equal_torch(preset):
    """A text of 8,192 tokens, far past where rotary positions were trained or windows end; of the
    true shape but for the vocabulary, which takes memory and no part in it."""
    spec = dataclasses.replace(PRESETS[preset], vocab_size=4000, pad_token_id=0)
    model = torch_model(spec, deviation=0.03)
    model.set_attn_implementation("sdpa")  # eager attention would hold all scores at once
    params = from_torch(spec, model)
    tokens_RS = np.random.default_rng(0).integers(2, 4000, (1, 8192)).astype(np.int32)
    embed = functools.partial(Encoder(spec).embed, pooling="mean", attention="looped")
    starts_RK, lengths_RK = np.array([[0]], np.int32), np.array([[8192]], np.int32)
    got_D = jax.jit(embed)(params, tokens_RS, starts_RK, lengths_RK)[0, 0]
    with torch.no_grad():
        states_SD = model(input_ids=torch.tensor(tokens_RS).long())[0][0]
    expected_D = torch.nn.functional.normalize(states_SD.mean(0), dim=0).numpy()
    difference = np.abs(got_D - expected_D).max()
    print(f"{preset}, 8192 tokens: largest difference {difference:.2e}")
    assert difference <= 1e-5
