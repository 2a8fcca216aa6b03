"""Files that anybody may have written: whatever is in them, an answer or one clear error.

Headers of weights: `tests/models/test_refusals.py`.
"""

import gzip
import itertools
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.version import Version

from arcticjax.checkpoint.manifest import FILE_NAME, write_manifest
from arcticjax.checkpoint.step_directories import StepDirectories
from arcticjax.config import load_config
from arcticjax.config.schema import SourceConfig
from arcticjax.data import adapters, stored
from arcticjax.data.bad_records import BadRecords
from arcticjax.errors import CheckpointError, ConfigError, DataError
from arcticjax.models.pretrained import load_pretrained
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.train.json_lines import read_json_lines
from launch import specs
from launch.gke.spec import GkeSpec
from launch.slurm.__main__ import SlurmSpec
from launch.tpu_vm.spec import TpuVmSpec
from tests import tiny
from tests.models import folders

ROOT = Path(__file__).resolve().parent.parent
ATTEMPTS = settings(max_examples=25, deadline=None)
# Anything that JSON can say, small.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def leaves(value, path=()):
    """Paths of all parts of nested plain values."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | JSON.map(
    lambda value: json.dumps(value).encode()
))  # fmt: skip
@ATTEMPTS
def test_any_bytes_as_a_config(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("any") / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(str(file))):
        load_config(file)


@given(st.lists(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode())))
@ATTEMPTS
def test_any_lines_as_a_source(tmp_path_factory, lines):
    """Every record is a pair of texts, left out, or named in an error."""
    file = tmp_path_factory.mktemp("any") / "pairs.jsonl"
    file.write_bytes(b'{"query": "a", "document": "b"}\n' + b"\n".join(lines))
    source = SourceConfig(name="any", path=str(file), bad_records="skip", bad_records_limit=1)
    records = BadRecords(source)
    pairs = list(adapters.read_pairs(source, records))
    assert pairs[0] == ("a", "b")
    assert all(text.strip() for pair in pairs for text in pair)
    # The same without leaving anything out stops at the first of them.
    strict = SourceConfig(name="any", path=str(file))
    if records.left_out:
        with pytest.raises(DataError, match=r"source 'any', .*pairs\.jsonl, line \d+"):
            list(adapters.read_pairs(strict))
    else:
        assert list(adapters.read_pairs(strict)) == pairs


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A stored source; a test puts its manifest back."""
    folder = tmp_path_factory.mktemp("stored")
    tokenizer = TextTokenizer.from_file(tiny.tokenizer_folder(folder / "words"))
    pairs = iter(tiny.pairs(0, 20))
    return stored.write_source(folder / "s", "web", pairs, tokenizer, origin={}).directory


@given(st.data())
@ATTEMPTS
def test_any_value_anywhere_in_a_manifest_of_data(source, data):
    """It opens, or the error names the file; and no file outside the folder is opened."""
    file = source / stored.MANIFEST
    whole = json.loads(file.read_text())
    path = data.draw(st.sampled_from(list(leaves(whole))))
    outside = st.sampled_from(["../words/tokenizer.json", "/etc/hostname", "", ".", -1, 2**70])
    changed = replaced(whole, path, data.draw(JSON | outside))
    file.write_text(json.dumps(changed))
    try:
        opened = stored.open_source(source)
        opened.read(np.arange(min(len(opened), 20)))
    except (DataError, IndexError) as error:
        assert str(source) in str(error) or isinstance(error, IndexError)
    finally:
        file.write_text(json.dumps(whole))


@given(st.data())
@ATTEMPTS
def test_any_damage_to_a_manifest_of_a_checkpoint(tmp_path_factory, data):
    """A step whose manifest was changed is never taken for good."""
    directories = StepDirectories(tmp_path_factory.mktemp("any"))
    step = directories.path(3)
    step.mkdir()
    (step / "array").write_bytes(b"numbers")
    write_manifest(step, 3, {})
    assert directories.verify(3)[0] is None
    file = step / FILE_NAME
    whole = file.read_bytes()
    content = json.loads(whole)
    path = data.draw(st.sampled_from(list(leaves(content))))
    changed = json.dumps(replaced(content, path, data.draw(JSON))).encode()
    cut = data.draw(st.integers(0, len(whole) - 2))
    damaged = data.draw(st.sampled_from([changed, whole[:cut], whole[cut + 1 :]]))
    file.write_bytes(damaged)
    try:
        same = _text(json.loads(damaged)) == _text(content)
    except ValueError:
        same = False
    assert (directories.verify(3)[0] is None) == same


def _text(value):
    """Tells 1 from True and from 1.0, as a hash does."""
    return json.dumps(value, sort_keys=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model's folder; a test puts its files back."""
    root = folders.complete(tmp_path_factory.mktemp("models") / "model")
    lengths = {"query_length": 16, "document_length": 48}
    folders.write(root / "arcticjax.json", {"contract": lengths})
    folders.write(root / "tokenizer_config.json", {"model_max_length": 48})
    return root


@given(st.data())
@ATTEMPTS
def test_any_value_anywhere_in_the_files_of_a_model(model, data):
    """It loads, or the error names the folder."""
    file = data.draw(st.sampled_from(sorted(model.rglob("*.json"))))
    whole = json.loads(file.read_text())
    path = data.draw(st.sampled_from(list(leaves(whole))))
    changed = replaced(whole, path, data.draw(JSON | st.sampled_from([-1, 2**70, "../x", "/x"])))
    file.write_text(json.dumps(changed))
    try:
        load_pretrained(model)
    except (CheckpointError, ConfigError) as error:
        assert str(model) in str(error)
    finally:
        file.write_text(json.dumps(whole))


@given(st.data())
@ATTEMPTS
def test_any_value_anywhere_in_a_tokenizer(tmp_path_factory, data):
    """It gives ids, or the error names the file."""
    file = tmp_path_factory.mktemp("any") / "tokenizer.json"
    whole = folders.tokenizer_json()
    path = data.draw(st.sampled_from(list(leaves(whole))))
    file.write_text(json.dumps(replaced(whole, path, data.draw(JSON | st.just(2**70)))))
    try:
        tokenizer = TextTokenizer.from_file(file)
    except CheckpointError as error:
        assert str(file) in str(error)
        return
    try:
        found = tokenizer.encode(["a b", "", "query: c"])
    except DataError:
        return
    assert len(found) == 3 and all(ids.dtype == np.int32 for ids in found)


SPECS = {
    "gke": (GkeSpec, ROOT / "launch/gke/example.yaml"),
    "slurm": (SlurmSpec, ROOT / "launch/slurm/gpu.yaml"),
    "tpu_vm": (TpuVmSpec, ROOT / "launch/tpu_vm/example.yaml"),
}


@pytest.mark.parametrize("launcher", SPECS)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_any_value_anywhere_in_a_launch_spec(tmp_path_factory, launcher, data):
    kind, example = SPECS[launcher]
    whole = yaml.safe_load(example.read_text())
    file = tmp_path_factory.mktemp("any") / "spec.yaml"
    path = data.draw(st.sampled_from(list(leaves(whole))))
    file.write_text(json.dumps(replaced(whole, path, data.draw(JSON))))
    try:
        assert isinstance(specs.load(file, kind), kind)
    except ConfigError as error:
        assert str(file) in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested deeper than 32 levels"),
        (b"name: a\nname: b\n", "line 2: name: given twice"),
        (b"a: &a [x]\nb: *a\n", "aliases are not read"),
        (b"!!python/object/apply:os.system [id]", "the tag .* is not read"),
        (b"\xff", "cannot be read"),
        (b"", "expected fields"),
        (b"x" * 1_000_001, "larger than 1 MB"),
    ],
)
def test_yaml_traps_in_a_launch_spec(tmp_path, content, message):
    file = tmp_path / "spec.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{re.escape(str(file))}: .*{message}"):
        specs.load(file, TpuVmSpec)


@pytest.fixture(scope="module")
def pairs_files(tmp_path_factory):
    """The same pairs as Parquet and as gzipped JSONL."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = [{"query": query, "document": document} for query, document in tiny.pairs(0, 20)]
    packed = gzip.compress("\n".join(map(json.dumps, lines)).encode(), mtime=0)
    (folder / "pairs.jsonl.gz").write_bytes(packed)
    return [tiny.parquet(folder / "pairs.parquet", 0, 20), folder / "pairs.jsonl.gz"]


@pytest.mark.parametrize("kind", [0, 1], ids=["parquet", "jsonl.gz"])
@given(data=st.data())
@ATTEMPTS
def test_any_damage_to_a_file_of_pairs(tmp_path_factory, pairs_files, kind, data):
    """Pairs of texts, or an error that names source and file."""
    good = pairs_files[kind]
    damaged = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged) - 1)) :]
    file = tmp_path_factory.mktemp("any") / good.name
    file.write_bytes(damaged)
    try:
        pairs = list(adapters.read_pairs(SourceConfig(name="any", path=str(file))))
    except DataError as error:
        assert f"source 'any', {file}" in str(error)
    else:
        assert all(text.strip() for pair in pairs for text in pair)


@given(st.lists(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode())))
@ATTEMPTS
def test_any_lines_as_metrics(tmp_path_factory, lines):
    file = tmp_path_factory.mktemp("any") / "metrics.jsonl"
    file.write_bytes(b"\n".join(lines))
    records, _ = read_json_lines(file)
    assert all(record["step"] >= 0 for record in records)


# The lowest version without a hole by which a file runs code: PyYAML CVE-2020-14343, pyarrow
# CVE-2023-47248, torch CVE-2025-32434, transformers CVE-2026-4372 and CVE-2026-5241.
SAFE = {"pyyaml": "5.4", "pyarrow": "14.0.1", "torch": "2.6", "transformers": "5.3"}


def test_dependencies_are_at_versions_that_are_safe():
    """What is required at least, and what is locked."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = itertools.chain.from_iterable(project["optional-dependencies"].values())
    required = [*project["dependencies"], *extras]
    found = {one.name: one.specifier for one in map(Requirement, required)}
    locked = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    for name, safe in SAFE.items():
        lowest = [Version(one.version) for one in found[name] if one.operator == ">="]
        assert lowest and lowest[0] >= Version(safe), name
        versions = [Version(one["version"]) for one in locked if one["name"] == name]
        assert versions and min(versions) >= Version(safe), name
