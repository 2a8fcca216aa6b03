"""Files that anybody may have written: whatever is in them, an answer or one clear error.

Weights and configs of models: `tests/models/test_refusals.py`.
"""

import itertools
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
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
from arcticjax.errors import ConfigError, DataError
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.train.json_lines import read_json_lines
from tests import tiny

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
