"""The config of mining: read by the same loader as that of training, with its own rules."""

import pytest

from arcticjax.config import InputConfig, MineConfig, describe, differences, dump_config, load
from arcticjax.errors import ConfigError

WHOLE = "teacher: m\ninput:\n  - {name: a, path: a.parquet}\noutput: out\n"


def test_a_list_of_inputs_and_one_path(write):
    config = load(MineConfig, write(WHOLE), ["top_k=50", "contract.query_prompt=query: "])
    assert config.input == [InputConfig(name="a", path="a.parquet")]
    assert (config.top_k, config.contract.query_prompt) == (50, "query: ")
    assert config.contract.document_prompt is None
    one = load(MineConfig, write("teacher: m\ninput: a.parquet\noutput: out\n"))
    assert one.input == "a.parquet"
    assert load(MineConfig, write(dump_config(config))) == config
    assert differences(config, config.model_copy(update={"top_k": 5})) == [("top_k", 50, 5)]


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        ("teacher: m\noutput: out\n", [], "input: required, and not given"),
        (WHOLE + "contrast: {}\n", [], "unknown field; did you mean contract"),
        (WHOLE, ["top_q=3"], r"unknown field; did you mean top_k\?"),
        (WHOLE, ["contract.pooling=max"], "expected cls | mean | last or null, got 'max'"),
        (WHOLE, ["input=[]"], "input: the list is empty"),
        (WHOLE, ["top_k=0"], "expected a whole number >= 1, got 0"),
        (
            "teacher: m\ninput: [{name: a, path: x}, {name: a, path: y}]\noutput: out\n",
            [],
            r"input\.1\.name: 'a' is the name of several inputs",
        ),
    ],
)
def test_mistakes(write, text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(MineConfig, write(text), overrides)


def test_every_field_is_described():
    text = describe(MineConfig)
    for field in ("teacher", "input.N.path", "output", "top_k", "contract.query_prompt"):
        assert f"  {field}: " in text
    assert "\ncontract: Replaces" in text
