import importlib.util

import pytest

from arcticjax import errors
from arcticjax.plan import topology


@pytest.mark.parametrize(
    ("name", "devices"), [("v5e:16x16", 256), ("v5p:4x4x4", 64), ("V6E:8x8", 64), ("cpu:8", 8)]
)
def test_names(name, devices):
    target = topology.parse(name)
    sides = 1
    for side in target.sides:
        sides *= side
    assert (target.devices or sides) == devices
    assert (target.chip is None) == (name == "cpu:8")


def test_no_name_is_this_machine():
    assert topology.parse(None) == topology.Target("local")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e", "v5e:16x16"),
        ("v5:4x4", "did you mean v5"),
        ("v9:8", "v5e, v5p, v6e, cpu"),
        ("h200:8", "GPUs.*leave --topology out"),
        ("gpu:8", "GPUs.*leave --topology out"),
        ("v5e:16", "2 sides.*v5e:16x4"),
        ("v5p:4x4", "3 sides.*v5p:4x4x4"),
        ("v5e:1x1", "even.*v5e:2x2"),
        ("v5e:3x4", "even.*v5e:4x4"),
        ("v5e:0x0", "v5e:2x2"),
        ("cpu:2x4", "one number"),
        ("cpu:0", "one number"),
        ("cpu:100000", "at most 1024"),
        ("", "KIND:SIZE"),
    ],
)
def test_a_wrong_name_is_explained(name, words):
    with pytest.raises(errors.ConfigError, match=words) as problem:
        topology.parse(name)
    assert "--topology" in str(problem.value)


@pytest.mark.parametrize(
    ("name", "share"), [("v5e:16x16", 1), ("v5e:8x16", 0.75), ("v5e:8x8", 0.5), ("v5p:4x4x8", 1)]
)
def test_a_side_that_is_no_ring_halves_its_links(name, share):
    target = topology.parse(name)
    assert target.ici_bandwidth == share * target.chip.ici_bandwidth


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.ConfigError, match=r"pip install 'arcticjax\[tpu\]'"):
        topology.open_devices(topology.parse("v5e:4x4"))


def test_fewer_devices_than_asked_for():
    with pytest.raises(errors.ConfigError, match="needs 64 devices, but jax started with 8"):
        topology.open_devices(topology.parse("cpu:64"))
