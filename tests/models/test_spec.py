"""Presets have the published sizes; foreign configs are read strictly and written back."""

import dataclasses
import json
from typing import Any, cast, get_args

import pytest

from arcticjax.config.schema import Preset
from arcticjax.errors import CheckpointError, ConfigError
from arcticjax.models.resolve import resolve
from arcticjax.models.spec import PRESETS, ModelSpec

# Published counts: with the unused pooler of BERT and XLM-RoBERTa, and those without one.
WITH_POOLER = {
    "xs": 22_713_216,
    "s": 33_360_000,
    "m": 109_482_240,
    "m-v1.5": 109_482_240,
    "l": 335_141_888,
    "l-v2": 567_754_752,
}
WITHOUT_POOLER = {
    "m-long": 136_731_648,
    "m-v2": 305_368_320,
    "modernbert-base": 149_014_272,
    "modernbert-large": 394_781_696,
}


def test_presets_are_those_of_the_config():
    assert set(get_args(Preset)) == PRESETS.keys() == WITH_POOLER.keys() | WITHOUT_POOLER.keys()


@pytest.mark.parametrize("name", WITH_POOLER)
def test_presets_have_the_published_parameter_counts(name: str):
    spec = PRESETS[name]
    assert spec.parameter_count(with_pooler=True) == WITH_POOLER[name]
    pooler = spec.hidden_size**2 + spec.hidden_size
    assert spec.parameter_count() == WITH_POOLER[name] - pooler
    assert spec.pooling == "cls"


@pytest.mark.parametrize("name", WITHOUT_POOLER)
def test_presets_without_pooler_have_the_published_parameter_counts(name: str):
    assert PRESETS[name].parameter_count() == WITHOUT_POOLER[name]
    assert PRESETS[name].pooling == "cls"


@pytest.mark.parametrize("name", PRESETS)
def test_hugging_face_form_round_trips(name: str):
    spec = dataclasses.replace(PRESETS[name], layer_norm_epsilon=1e-7, initializer_range=0.01)
    assert ModelSpec.from_hf(json.loads(json.dumps(spec.to_hf()))) == spec


def test_real_config_is_the_xs_shape():
    folder = resolve("sentence-transformers/all-MiniLM-L6-v2")
    spec = ModelSpec.from_hf(json.loads((folder / "config.json").read_text()), pooling="mean")
    assert spec == dataclasses.replace(PRESETS["xs"], pooling="mean")


def test_every_problem_of_a_config_is_reported_at_once():
    config = PRESETS["xs"].to_hf() | {
        "hidden_act": "relu",
        "position_embedding_type": "relative_key",
        "vocab_size": "30522",
        "num_hidden_layers": True,
        "layer_norm_eps": -1,
    }
    del config["hidden_size"]
    with pytest.raises(CheckpointError) as caught:
        ModelSpec.from_hf(config)
    for word in (
        "hidden_act is 'relu'",
        "position_embedding_type",
        "vocab_size is '30522'",
        "num_hidden_layers is True",
        "hidden_size is missing",
        "layer_norm_eps is -1",
    ):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "mamba"}, "known are bert, xlm-roberta, nomic_bert, gte, modernbert, new"),
        ({"auto_map": {"AutoModel": "modeling.Custom"}}, "auto_map"),
        ({"num_attention_heads": 7}, "not a multiple of num_heads 7"),
        ({"is_decoder": True}, "is_decoder"),
    ],
)
def test_a_foreign_config_is_refused(change: dict, word: str):
    with pytest.raises(CheckpointError, match=word):
        ModelSpec.from_hf(PRESETS["xs"].to_hf() | change)


def test_a_spec_that_does_not_fit_together_is_refused():
    with pytest.raises(ConfigError, match="hidden_size 384 is not a multiple of num_heads 5"):
        ModelSpec(num_heads=5)
    with pytest.raises(ConfigError, match="rotary is None, which does not go with family gte"):
        ModelSpec(family="gte")
    with pytest.raises(ConfigError, match="pad_token_id 30522 is not one of 30522 tokens"):
        ModelSpec(pad_token_id=30522)
    with pytest.raises(ConfigError, match="pooling is 'max', known are cls, mean, last"):
        ModelSpec(pooling=cast(Any, "max"))
