"""The text contract survives storage and refuses what it cannot mean."""

import dataclasses
import json
from typing import Any, cast

import pytest

from arcticjax.config import TextContract
from arcticjax.errors import ConfigError

CONTRACT = TextContract(
    query_prompt="query: ", document_prompt="", query_length=32, document_length=256, pooling="cls"
)


def test_stored_and_read_back():
    stored = json.loads(json.dumps(CONTRACT.to_dict()))
    assert TextContract.from_dict(stored) == CONTRACT
    assert stored["normalize"] is True
    assert len({CONTRACT, TextContract.from_dict(stored)}) == 1


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(TextContract)])
def test_a_missing_field_is_not_guessed(name):
    stored = CONTRACT.to_dict()
    del stored[name]
    with pytest.raises(ConfigError, match=f"missing {name}"):
        TextContract.from_dict(stored)


def test_unknown_fields():
    with pytest.raises(ConfigError, match="unknown prompt"):
        TextContract.from_dict({**CONTRACT.to_dict(), "prompt": ""})
    with pytest.raises(ConfigError, match="expected a mapping"):
        TextContract.from_dict(cast(Any, []))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query_prompt", None),
        ("document_prompt", 3),
        ("query_length", 2),
        ("document_length", 2.0),
        ("query_length", True),
        ("pooling", "max"),
        ("normalize", 1),
    ],
)
def test_impossible_values(name, value):
    with pytest.raises(ConfigError, match=f"{name}: expected"):
        dataclasses.replace(CONTRACT, **{name: value})


def test_all_problems_at_once():
    with pytest.raises(ConfigError, match=r"query_length.*pooling"):
        dataclasses.replace(CONTRACT, query_length=0, pooling="max")
