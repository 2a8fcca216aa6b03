"""With the real compiler for GPUs, which needs the extra `cuda`, and neither a GPU nor a driver."""

import json
from pathlib import Path

import jax
import pytest

from arcticjax.models import attention_choice
from arcticjax.parallel import mesh as meshes
from arcticjax.plan import gpus, topology
from arcticjax.plan.__main__ import main
from tests import tiny

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WITHOUT_SCORING = ("evaluation.tasks=[]", "evaluation.every_steps=null")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not gpus.has_plugin(), reason="the extra cuda is not installed"),
]


def planned(config, target, folder, *sets, options=()):
    """What `--json` holds."""
    file = folder / "plan.json"
    arguments = ["--config", str(config), "--topology", target, "--json", str(file), *options]
    for one in sets:
        arguments += ["--set", one]
    assert main(arguments) == 0
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("a100:2", "NVIDIA A100-SXM4-80GB", 1),
        ("h100:8", "NVIDIA H100 80GB HBM3", 1),
        ("h200:32", "NVIDIA H200", 4),
    ],
)
def test_gpus_are_described_as_real_ones_say_they_are(name, kind, processes):
    target = topology.parse(name)
    found = topology.open_devices(target)
    assert len(found) == target.sides[0]
    assert {(device.platform, device.device_kind) for device in found} == {("gpu", kind)}
    assert len({device.process_index for device in found}) == processes


def test_attention_is_that_of_a_real_gpu(tmp_path):
    """What was measured on devices of that name decides."""
    shape = {"head_size": 64, "row_length": 256, "dtype": "bfloat16"}
    slow, fast = {"xla": 2.0, "cudnn": 1.0}, {"xla": 1.0, "cudnn": 2.0}
    kinds = {"NVIDIA H200": slow, "NVIDIA H100 80GB HBM3": fast}
    table = tmp_path / "times.json"
    rows = [
        {"platform": "gpu", "device_kind": kind, "milliseconds": times, **shape}
        for kind, times in kinds.items()
    ]
    table.write_text(json.dumps(rows))
    for name, chosen in (("h200:1", "cudnn"), ("h100:1", "xla")):
        [device] = topology.open_devices(topology.parse(name))
        assert attention_choice.choose("auto", device=device, table=table, **shape) == chosen


def test_every_host_is_a_slice():
    target = topology.parse("h200:32")
    mesh = meshes.make_mesh(
        "auto", 2, target.slices("auto"), among=topology.open_devices(target)
    )  # fmt: skip
    assert dict(mesh.shape) == {"slice": 4, "data": 4, "fsdp": 2}
    for host, devices in enumerate(mesh.devices):
        assert {device.process_index for device in devices.flat} == {host}


def test_a_step_with_the_kernel_of_cudnn(tmp_path):
    """Compiled in full, on two hosts: the kernel is there, and documents are gathered inside a host
    and then across hosts."""
    sets = {"train.attention": "cudnn", "train.precision": "bfloat16"}
    config = tiny.run_config(tmp_path, **{"mesh.data": "auto", **sets})
    text = []
    compiled = jax.stages.Compiled.as_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            jax.stages.Compiled, "as_text", lambda one: text.append(compiled(one)) or text[-1]
        )
        plan = planned(config, "h200:16", tmp_path)
    assert "fmha" in text[0]
    assert plan["fits"] and plan["devices"] == 16 and plan["mesh"]["slice"] == 2
    assert plan["compiled_shapes"][0]["attention"] == "cudnn"
    assert plan["hbm_bytes_per_chip"] == sum(plan["hbm_parts"].values())
    assert plan["hbm_capacity_bytes"] == 3 * topology.CHIPS["h200"].hbm_bytes // 4
    gathered = {one["axis"] for one in plan["collectives"] if one["op"] == "all-gather"}
    assert {"data", "slice"} <= gathered
    assert plan["projection"]["network_seconds"] > 0


@pytest.mark.parametrize("target", ["a100:8", "h100:8", "h200:8"])
@pytest.mark.parametrize("recipe", ["xs", "m", "l"])
def test_recipes_fit_a_host_of_gpus(recipe, target, tmp_path):
    plan = planned(CONFIGS / f"pretrain_{recipe}.yaml", target, tmp_path, *WITHOUT_SCORING)
    assert plan["fits"] and plan["hbm_bytes_per_chip"] < 0.95 * plan["hbm_capacity_bytes"]
    assert plan["refused"] is None
    assert not any(one["in_loop"] for one in plan["collectives"])
    assert plan["pairs_per_second"] > 0


def test_a_batch_that_does_not_fit_is_made_to(tmp_path):
    """The compiler says nothing of it: what it counts is compared with the memory."""
    sets = ("train.passes=one", "train.global_batch=2048", "train.microbatch=64")
    recipe = CONFIGS / "pretrain_m.yaml"
    plan = planned(recipe, "h100:1", tmp_path, *WITHOUT_SCORING, *sets, options=["--fit"])
    assert not plan["fits"] and plan["refused"] is None
    assert plan["hbm_bytes_per_chip"] > plan["hbm_capacity_bytes"]
    assert plan["fit"]["changes"] and plan["fit"]["plan"]["fits"]
