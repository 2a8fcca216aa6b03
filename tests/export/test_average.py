"""Averages of encoders: the mean, the arc between two, and what cannot be averaged."""

import dataclasses
import json

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from arcticjax.config.contract import TextContract
from arcticjax.errors import ConfigError
from arcticjax.export.average import average
from arcticjax.export.source import Source, open_source
from tests import tiny


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Source]:
    folder = tmp_path_factory.mktemp("models")
    return [open_source(tiny.model_folder(folder / f"model{seed}", seed=seed)) for seed in range(3)]


def flat(source):
    return flatten_dict(source.params, sep="/")


def test_a_uniform_soup_is_the_mean(sources):
    found = average(sources, "uniform")
    for path, leaf in flat(found).items():
        expected = np.mean([flat(source)[path].astype(np.float64) for source in sources], axis=0)
        assert leaf.dtype == np.float32
        np.testing.assert_allclose(leaf, expected, rtol=1e-7, atol=1e-12, err_msg=path)
    assert found.averaged == "mean" and found.run is None


def test_of_equal_encoders_nothing_changes(sources):
    for method in ("uniform", "slerp"):
        found = average([sources[0], sources[0]], method)
        for path, leaf in flat(found).items():
            np.testing.assert_array_equal(leaf, flat(sources[0])[path], err_msg=path)


def test_slerp_runs_on_the_arc_of_every_tensor(sources):
    """Half-way, the angle to each end is half the whole; each layer's tensor is one of its own."""
    first, second = sources[:2]
    found = flat(average([first, second], "slerp"))

    def angle(a, b):
        a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        return np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    for path, layer in (("embeddings/token", ...), ("layers/mlp/up/kernel", 1)):
        a, middle, b = (tree[path][layer] for tree in (flat(first), found, flat(second)))
        assert angle(a, middle) == pytest.approx(angle(a, b) / 2, rel=1e-5)
        assert angle(middle, b) == pytest.approx(angle(a, b) / 2, rel=1e-5)
        # Longer than the chord's middle, which is what a mean gives.
        assert np.linalg.norm(middle) > 1.2 * np.linalg.norm((a + b) / 2)
    quarter = flat(average([first, second], "slerp", 0.25))["embeddings/token"]
    tokens = flat(first)["embeddings/token"]
    whole = angle(tokens, flat(second)["embeddings/token"])
    assert angle(tokens, quarter) == pytest.approx(whole / 4, rel=1e-5)


def test_the_ends_of_the_arc_are_the_encoders(sources):
    for fraction, end in ((0.0, sources[0]), (1.0, sources[1])):
        found = flat(average(sources[:2], "slerp", fraction))
        for path, leaf in flat(end).items():
            np.testing.assert_allclose(found[path], leaf, atol=1e-7, err_msg=path)


def test_opposite_and_zero_tensors_take_the_straight_line(sources):
    opposite = dataclasses.replace(
        sources[0], params={**sources[0].params, "layers": sources[0].params["layers"]}
    )
    opposite.params["embeddings"] = {
        **sources[0].params["embeddings"],
        "token": -sources[0].params["embeddings"]["token"],
    }
    found = average([sources[0], opposite], "slerp", 0.25)
    np.testing.assert_allclose(
        found.params["embeddings"]["token"],
        sources[0].params["embeddings"]["token"] / 2,
        rtol=1e-6,
    )
    assert all(np.isfinite(leaf).all() for leaf in flat(found).values())


def test_what_differs_in_more_than_weights_is_refused(sources, tmp_path):
    first = sources[0]
    wider = dataclasses.replace(first, spec=dataclasses.replace(first.spec, num_layers=3))
    with pytest.raises(ConfigError, match="model num_layers 2 and 3"):
        average([first, wider], "uniform")
    other = TextContract("query: ", "", 16, 32, "mean")
    with pytest.raises(ConfigError, match="text contract query_prompt '' and 'query: '"):
        average([first, dataclasses.replace(first, contract=other)], "uniform")
    with pytest.raises(ConfigError, match="truncate_dim None and 8"):
        average([first, dataclasses.replace(first, truncate_dim=8)], "uniform")
    folder = tiny.tokenizer_folder(tmp_path / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["river"], vocabulary["stone"] = vocabulary["stone"], vocabulary["river"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"tokenizer \w{12} and \w{12}"):
        average([first, dataclasses.replace(first, tokenizer_folder=folder)], "slerp")


def test_numbers_that_make_no_average(sources):
    with pytest.raises(ConfigError, match="two checkpoints or more"):
        average(sources[:1], "uniform")
    with pytest.raises(ConfigError, match="slerp goes between two"):
        average(sources, "slerp")
    with pytest.raises(ConfigError, match=r"fraction: 1\.5"):
        average(sources[:2], "slerp", 1.5)
