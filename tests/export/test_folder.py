"""The exported folder: complete, exact, atomic, and free of what a foreign tokenizer brings."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file

from arcticjax.config.contract import TextContract
from arcticjax.errors import CheckpointError, ConfigError, ResourceError
from arcticjax.export import folder as folder_module
from arcticjax.export.folder import Storage, write_folder
from arcticjax.models.pretrained import load_pretrained
from arcticjax.models.resolve import resolve
from arcticjax.models.spec import ModelSpec, parameter_shapes

TOKENIZER = resolve("sentence-transformers/all-MiniLM-L6-v2")
SPEC = ModelSpec(
    hidden_size=4, num_layers=2, num_heads=2, intermediate_size=8, max_positions=64, pooling="cls"
)
CONTRACT = TextContract(
    query_prompt="query: ",
    document_prompt="",
    query_length=16,
    document_length=48,
    pooling="cls",
)


def random_params(spec=SPEC, seed=0):
    generator = np.random.default_rng(seed)
    return unflatten_dict(
        {
            path: generator.normal(size=shape).astype(np.float32)
            for path, shape in parameter_shapes(spec).items()
        },
        sep="/",
    )


def export(output, **changes):
    options = {
        "spec": SPEC,
        "params": random_params(),
        "tokenizer_folder": TOKENIZER,
        "contract": CONTRACT,
    }
    return write_folder(output, **{**options, **changes})


def read(path):
    return json.loads(path.read_text())


def test_every_file_of_the_layout(tmp_path):
    output = export(tmp_path / "out")
    assert {str(path.relative_to(output)) for path in output.rglob("*")} == {
        "1_Pooling",
        "1_Pooling/config.json",
        "2_Normalize",
        "README.md",
        "arcticjax.json",
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    }
    assert [module["type"].rsplit(".", 2)[1:] for module in read(output / "modules.json")] == [
        ["models", "Transformer"],
        ["models", "Pooling"],
        ["models", "Normalize"],
    ]
    pooling = read(output / "1_Pooling" / "config.json")
    assert [flag for flag, value in pooling.items() if value is True] == [
        "pooling_mode_cls_token",
        "include_prompt",
    ]
    assert pooling["word_embedding_dimension"] == 4
    assert read(output / "sentence_bert_config.json")["max_seq_length"] == 48
    settings = read(output / "config_sentence_transformers.json")
    assert settings["prompts"] == {"query": "query: ", "document": ""}
    assert settings["similarity_fn_name"] == "cosine"
    assert read(output / "tokenizer_config.json")["model_max_length"] == 64
    tokenizer = (output / "tokenizer.json").read_bytes()
    assert tokenizer == (TOKENIZER / "tokenizer.json").read_bytes()
    config = read(output / "config.json")
    assert ModelSpec.from_hf(config) == SPEC and config["torch_dtype"] == "float32"


def test_weights_are_marked_readable_and_named_without_prefix(tmp_path):
    output = export(tmp_path / "out")
    with safe_open(output / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
    assert "encoder.layer.1.attention.self.query.weight" in names
    assert not any(name.startswith("bert.") for name in names)
    mode = (output / "model.safetensors").stat().st_mode
    assert mode == (output / "config.json").stat().st_mode


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_what_is_written_is_what_is_read(tmp_path, pooling):
    contract = TextContract("q: ", "d: ", 12, 30, pooling)
    output = export(tmp_path / "out", contract=contract)
    loaded = load_pretrained(output)
    assert loaded.contract == contract
    expected = flatten_dict(random_params(), sep="/")
    found = flatten_dict(loaded.params, sep="/")
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert np.array_equal(found[path], value), path


def test_jax_arrays_and_lower_precision(tmp_path):
    params = {key: value for key, value in random_params().items()}
    params["embeddings"]["token"] = jnp.asarray(params["embeddings"]["token"])
    output = export(tmp_path / "out", params=params, storage=Storage("bfloat16"))
    table = load_file(output / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert table.dtype == ml_dtypes.bfloat16
    assert read(output / "config.json")["torch_dtype"] == "bfloat16"


def test_weights_in_shards(tmp_path):
    """As Hugging Face writes them, and read back whole; a tensor beyond the limit has a shard."""
    output = export(tmp_path / "out", storage=Storage(shard_bytes=1000))
    index = read(output / "model.safetensors.index.json")
    files = sorted(path.name for path in output.glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert count > 2 and not (output / "model.safetensors").exists()
    stored = {name: load_file(output / name) for name in files}
    assert index["weight_map"] == {tensor: name for name in files for tensor in stored[name]}
    sizes = {name: [tensor.nbytes for tensor in stored[name].values()] for name in files}
    assert index["metadata"]["total_size"] == sum(sum(one) for one in sizes.values())
    assert all(sum(one) <= 1000 or len(one) == 1 for one in sizes.values())
    found = flatten_dict(load_pretrained(output).params, sep="/")
    for path, value in flatten_dict(random_params(), sep="/").items():
        assert np.array_equal(found[path], value), path


def test_truncation_is_written_and_checked(tmp_path):
    output = export(tmp_path / "out", storage=Storage(truncate_dim=3))
    assert read(output / "config_sentence_transformers.json")["truncate_dim"] == 3
    assert "first 3 of 4 numbers" in (output / "README.md").read_text()
    for size in (0, 4):
        with pytest.raises(ConfigError, match=f"truncate_dim: {size} is not within 1 to 3"):
            export(tmp_path / "no", storage=Storage(truncate_dim=size))


def test_published_weights_pass_through_unchanged(tmp_path):
    loaded = load_pretrained("sentence-transformers/all-MiniLM-L6-v2")
    output = write_folder(
        tmp_path / "out",
        spec=loaded.spec,
        params=loaded.params,
        tokenizer_folder=loaded.tokenizer_file.parent,
        contract=loaded.contract,
    )
    published = load_file(loaded.folder / "model.safetensors")
    ours = load_file(output / "model.safetensors")
    unused = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    assert set(published) - set(ours) == unused and set(ours) <= set(published)
    for name, value in ours.items():
        assert np.array_equal(value, published[name]), name


def test_foreign_tokenizer_settings_are_filtered(tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    shutil.copy(TOKENIZER / "tokenizer.json", source)
    (source / "evil.py").write_text("raise SystemExit")
    (source / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "auto_map": {"AutoTokenizer": ["evil.T", None]},
                "chat_template": "{{ evil }}",
                "name_or_path": "/home/somebody",
                "do_lower_case": True,
            }
        )
    )
    output = export(tmp_path / "out", tokenizer_folder=source)
    settings = read(output / "tokenizer_config.json")
    assert not {"auto_map", "chat_template", "name_or_path"} & set(settings)
    assert settings["do_lower_case"] is True
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokens = {name: settings[name] for name in ("cls_token", "sep_token", "pad_token", "unk_token")}
    assert list(tokens.values()) == ["[CLS]", "[SEP]", "[PAD]", "[UNK]"]
    assert not (output / "evil.py").exists()


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path):
    output = export(tmp_path / "out")
    (output / "stale.txt").touch()
    export(output, params=random_params(seed=1))
    assert not (output / "stale.txt").exists()
    table = load_pretrained(output).params["embeddings"]["token"]
    assert np.array_equal(table, random_params(seed=1)["embeddings"]["token"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    with pytest.raises(ConfigError, match="not empty and not an earlier export"):
        export(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter").exists()
    with pytest.raises(ConfigError, match="is a file"):
        export(tmp_path / "thesis" / "chapter")
    (tmp_path / "empty").mkdir()
    assert export(tmp_path / "empty").name == "empty"


def test_a_failed_write_leaves_the_earlier_export(tmp_path, monkeypatch):
    output = export(tmp_path / "out")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module, "write_shards", full)
    with pytest.raises(ResourceError, match="No space left"):
        export(output, params=random_params(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    table = load_pretrained(output).params["embeddings"]["token"]
    assert np.array_equal(table, random_params()["embeddings"]["token"])


def test_tokenizer_and_spec_must_fit(tmp_path):
    small = ModelSpec(vocab_size=100, hidden_size=4, num_layers=1, num_heads=1, intermediate_size=8)
    with pytest.raises(CheckpointError, match="token id is 30521, the token table has 100"):
        export(tmp_path / "out", spec=small, params=random_params(small))
    assert not list(tmp_path.iterdir())


def test_params_of_another_model_are_refused(tmp_path):
    params = random_params()
    params["embeddings"]["norm"]["bias"] = np.zeros(5, np.float32)
    with pytest.raises(CheckpointError, match="embeddings/norm/bias"):
        export(tmp_path / "out", params=params)
    assert not list(tmp_path.iterdir())


def test_card_states_the_contract_and_invents_nothing(tmp_path):
    card = Path(export(tmp_path / "out") / "README.md").read_text()
    for part in ('"query": "query: "', "48 tokens", "16 tokens", "library_name", "cls"):
        assert part in card
    for claim in ("license", "language:", "datasets"):
        assert claim not in card
