import importlib.metadata
import importlib.util
import os
import re

import pytest
from jax.experimental import topologies

from arcticjax import errors
from arcticjax.plan import gpus, topology


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("v5e:16x16", 256),
        ("v5p:4x4x4", 64),
        ("V6E:8x8", 64),
        ("cpu:8", 8),
        ("h200:1", 1),
        ("H100:32", 32),
    ],
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
        ("v9:8", "v5e, v5p, v6e, a100, h100, h200, cpu"),
        ("b200:8", "did you mean h200:8"),
        ("h200:12", "1 to 8 on one host, or a multiple of 8.*h200:8"),
        ("h200:2x4", "one number of GPUs"),
        ("h100:0", "one number of GPUs"),
        ("a100:2048", "at most 1024"),
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


@pytest.mark.parametrize(
    ("name", "group", "bandwidth"),
    [
        ("h200:8", range(8), 450e9),
        ("h200:16", range(8, 16), 450e9),  # inside a host
        ("h200:16", range(16), 8 * 50e9),  # eight rings, each with an adapter out of a host
        ("h200:16", (3, 11), 50e9),  # one of each host
        ("a100:32", range(32), 8 * 25e9),
        ("v5e:8x8", range(64), 100e9),
    ],
)
def test_what_crosses_hosts_of_gpus_is_slower(name, group, bandwidth):
    assert topology.parse(name).bandwidth(tuple(group)) == bandwidth


def test_hosts_of_gpus_are_slices():
    """As real ones report it; a number that a config gives stays."""
    assert topology.parse("h200:8").slices("auto") == "auto"
    assert topology.parse("h200:32").slices("auto") == 4
    assert topology.parse("h200:32").slices(1) == 1
    assert topology.parse("v5e:16x16").slices("auto") == "auto"


def test_jax_takes_a_share_of_the_memory_of_a_gpu(monkeypatch):
    target = topology.parse("h200:8")
    assert topology.memory(target) == 3 * 150_121_545_728 // 4
    assert "0.75 of the 139.81 GiB" in (topology.memory_note(target) or "")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    assert topology.memory(target) == int(0.9 * 150_121_545_728)
    assert topology.memory_note(topology.parse("v5e:4x4")) is None
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "90 %")
    with pytest.raises(errors.ConfigError, match="XLA_CLIENT_MEM_FRACTION: '90 %'"):
        topology.memory(target)


@pytest.mark.parametrize("name", ["a100", "h100", "h200"])
def test_a_gpu_is_described_in_full(name):
    """Every figure is there, once, and blocks are closed."""
    gpu = topology.CHIPS[name]
    text = gpus.describe(gpu)
    assert text.count("{") == text.count("}") == 4
    fields = dict(re.findall(r"(\w+): (\S+)", text))
    assert fields["device_memory_size"] == str(gpu.hbm_bytes)
    assert float(fields["memory_bandwidth"]) == gpu.hbm_bandwidth
    assert (
        int(fields["shared_memory_per_core"]) - int(fields["shared_memory_per_block_optin"]) == 1024
    )
    assert f'device_description_str: "{gpu.device_kind}"' in text
    assert f"{{ major: {gpu.capability[0]} minor: 0 }}" in text


def test_a_missing_plugin_is_named(monkeypatch):
    other = importlib.metadata.EntryPoint("xla_tpu", "module", "jax_plugins")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [other])
    with pytest.raises(
        errors.ConfigError, match=r"install arcticjax\[cuda\] \(uv run --extra cuda"
    ):
        topology.open_devices(topology.parse("h200:8"))


def test_a_plugin_that_describes_nothing_is_explained(monkeypatch):
    def refuse(**_):
        raise RuntimeError("FAILED_PRECONDITION: no such option\nand more")

    monkeypatch.setattr(gpus, "has_plugin", lambda: True)
    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(
        errors.ConfigError, match=r"h200:8: FAILED.*option; .*upgrade arcticjax"
    ) as said:
        topology.open_devices(topology.parse("h200:8"))
    assert "and more" not in str(said.value)


def test_only_what_a_target_needs_is_set(monkeypatch):
    for name, tpu in (("h200:8", False), ("v5e:4x4", True)):
        monkeypatch.delenv("TPU_WORKER_ID", raising=False)
        topology.prepare_environment(topology.parse(name))
        assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"
        assert ("TPU_WORKER_ID" in os.environ) == tpu


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.ConfigError, match=r"install arcticjax\[tpu\] \(uv run --extra tpu"):
        topology.open_devices(topology.parse("v5e:4x4"))


def test_fewer_devices_than_asked_for():
    with pytest.raises(errors.ConfigError, match="needs 64 devices, but jax started with 8"):
        topology.open_devices(topology.parse("cpu:64"))
