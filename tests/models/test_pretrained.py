"""Loading published folders: what they say is taken, what is unsafe or damaged is refused."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from arcticjax.errors import CheckpointError, ConfigError
from arcticjax.models.pretrained import load_pretrained
from arcticjax.models.spec import ModelSpec
from tests.models.folders import MINILM, random_params, tokenizer_json, write


def same_tree(a, b):
    flat_a, flat_b = flatten_dict(a, sep="/"), flatten_dict(b, sep="/")
    return flat_a.keys() == flat_b.keys() and all(
        np.array_equal(flat_a[path], flat_b[path]) for path in flat_a
    )


def test_published_minilm():
    loaded = load_pretrained(MINILM)
    assert loaded.spec == ModelSpec(pooling="mean")
    assert loaded.sha256 == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert loaded.name == MINILM
    contract = loaded.contract
    assert (contract.pooling, contract.query_length, contract.document_length) == ("mean", 256, 256)
    assert contract.query_prompt == contract.document_prompt == "" and contract.normalize
    raw = load_file(loaded.folder / "model.safetensors")
    kernel = loaded.params["layers"]["mlp"]["up"]["kernel"][4]
    assert np.array_equal(kernel, raw["encoder.layer.4.intermediate.dense.weight"].T)
    leaves = flatten_dict(loaded.params).values()
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
    assert sum(leaf.size for leaf in leaves) == loaded.spec.parameter_count()


def test_folder_is_read_as_it_says(folder):
    loaded = load_pretrained(folder)
    assert same_tree(loaded.params, random_params())
    contract = loaded.contract
    assert (contract.query_prompt, contract.document_prompt) == ("query: ", "")
    assert (contract.pooling, contract.query_length, contract.document_length) == ("cls", 48, 48)
    assert loaded.tokenizer_file == folder / "tokenizer.json"


def test_options_replace_what_the_folder_says(folder):
    loaded = load_pretrained(
        folder,
        pooling="last",
        query_prompt="q ",
        document_prompt="d ",
        query_length=16,
        document_length=64,
    )
    contract = loaded.contract
    assert (contract.query_prompt, contract.document_prompt) == ("q ", "d ")
    assert (contract.query_length, contract.document_length) == (16, 64)
    assert contract.pooling == loaded.spec.pooling == "last"
    assert load_pretrained(folder, query_prompt="").contract.query_prompt == ""


def test_first_layers_are_kept(folder):
    loaded = load_pretrained(folder, keep_layers=2)
    assert loaded.spec.num_layers == 2
    full = random_params()
    for path, leaf in flatten_dict(loaded.params["layers"]).items():
        assert np.array_equal(leaf, flatten_dict(full["layers"])[path][:2])
    assert np.array_equal(loaded.params["embeddings"]["token"], full["embeddings"]["token"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_layers": 4}, "keep_layers: 4 is not within 1 to the 3"),
        ({"keep_layers": 0}, "keep_layers: 0"),
        ({"query_length": 65}, "query_length: 65 tokens"),
        ({"document_length": 2}, "document_length: 2 tokens"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        load_pretrained(folder, **options)


@pytest.mark.parametrize(
    ("content", "pooling"),
    [
        ({"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True}, "mean"),
        ({"word_embedding_dimension": 8, "pooling_mode_lasttoken": True}, "last"),
        ({"embedding_dimension": 8, "pooling_mode": "cls"}, "cls"),
        ({"embedding_dimension": 8, "pooling_mode": ["mean"]}, "mean"),
    ],
)
def test_both_forms_of_pooling(folder, content, pooling):
    write(folder / "1_Pooling" / "config.json", content)
    assert load_pretrained(folder).contract.pooling == pooling


def test_newer_module_names_and_no_normalize(folder):
    write(
        folder / "modules.json",
        [
            {"path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
            {
                "path": "1_Pooling",
                "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
            },
        ],
    )
    assert load_pretrained(folder).contract.normalize


def test_plain_folder_needs_the_pooling_said(folder):
    (folder / "modules.json").unlink()
    with pytest.raises(ConfigError, match=r"set model\.pooling"):
        load_pretrained(folder)
    assert load_pretrained(folder, pooling="cls").contract.pooling == "cls"


def test_length_falls_back_to_the_tokenizer_then_the_positions(folder):
    (folder / "sentence_bert_config.json").unlink()
    write(folder / "tokenizer_config.json", {"model_max_length": 40})
    assert load_pretrained(folder).contract.document_length == 40
    write(folder / "tokenizer_config.json", {"model_max_length": 1e30})
    assert load_pretrained(folder).contract.document_length == 64


def test_lengths_of_an_own_export_come_back(folder):
    write(folder / "arcticjax.json", {"contract": {"query_length": 12, "document_length": 48}})
    contract = load_pretrained(folder).contract
    assert (contract.query_length, contract.document_length) == (12, 48)


def test_passage_prompt_is_the_document_prompt(folder):
    write(folder / "config_sentence_transformers.json", {"prompts": {"passage": "p: "}})
    assert load_pretrained(folder).contract.document_prompt == "p: "


def test_shards_are_read_together(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in parts.items() for name in members}
    write(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    loaded = load_pretrained(folder)
    assert same_tree(loaded.params, random_params())
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard model-2\.safetensors is missing"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["../w.safetensors", "/w.safetensors", "w.bin", "a\0.safetensors"])
def test_shard_names_stay_in_the_folder(folder, name):
    shutil.move(folder / "model.safetensors", folder.parent / "w.safetensors")
    write(folder / "model.safetensors.index.json", {"weight_map": {"x": name}})
    with pytest.raises(CheckpointError, match="not a plain"):
        load_pretrained(folder)


def test_half_precision_becomes_float32(folder):
    tensors = load_file(folder / "model.safetensors")
    halves = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    save_file(halves, folder / "model.safetensors")
    table = load_pretrained(folder).params["embeddings"]["token"]
    assert table.dtype == np.float32
    assert np.array_equal(table, halves["embeddings.word_embeddings.weight"].astype(np.float32))


def test_tiny_tokenizer_is_of_bert_kind():
    encoded = Tokenizer.from_str(json.dumps(tokenizer_json())).encode("Query: a b")
    assert encoded.tokens == ["[CLS]", "query", ":", "a", "b", "[SEP]"]
