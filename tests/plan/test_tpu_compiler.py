"""With the real TPU compiler, which needs the extra `tpu` and no TPU."""

import importlib.util
import json
from pathlib import Path

import jax
import pytest

from arcticjax import errors
from arcticjax.config import load_config
from arcticjax.data import layout
from arcticjax.models.spec import ModelSpec
from arcticjax.parallel import mesh as meshes
from arcticjax.plan import topology
from arcticjax.plan.__main__ import main
from arcticjax.step import program
from tests import tiny

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="the extra tpu is not installed"
    ),
]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("v5e:2x4", "TPU v5 lite"), ("v5p:2x2x1", "TPU v5"), ("v6e:4x4", "TPU v6 lite")],
)
def test_slices_are_described_one_device_a_chip(name, kind):
    target = topology.parse(name)
    found = topology.open_devices(target)
    assert {device.device_kind for device in found} == {kind}
    assert max(device.coords[0] for device in found) + 1 == target.sides[0]


def test_a_slice_that_libtpu_refuses(monkeypatch):
    target = topology.Target("v5e:3x3", topology.CHIPS["v5e"], (3, 3))
    with pytest.raises(errors.ConfigError, match=r"libtpu knows no slice v5e:3x3.*divisible"):
        topology.open_devices(target)


def test_a_training_step_with_the_splash_kernel(tmp_path):
    """Compiled in full: kernels that only lower may still be refused by the compiler."""
    spec = ModelSpec(
        vocab_size=120, hidden_size=128, num_layers=2, num_heads=4, intermediate_size=128
    )
    given = {"train.attention": "splash", "train.precision": "bfloat16", "data.row_length": 256}
    config = load_config(tiny.run_config(tmp_path, **given))
    mesh = meshes.make_mesh(2, 2, among=topology.open_devices(topology.parse("v5e:2x2")))
    shapes = layout.Shapes(4, 4, 256, 2, 16, 32)
    with jax.set_mesh(mesh):
        made = program.build(config, spec, "mean", shapes, mesh, 8, 2**34)
        state, buffers, batch = (
            made.abstract_state(), made.abstract_buffers(), made.abstract_batch()
        )  # fmt: skip
        assert made.announcement()["attention"] == "splash"
        text = made.lower(state, buffers, batch).compile().as_text()
    for kernel in ("splash_mha_fwd_segmented", "splash_mha_dkv_segmented"):
        assert kernel in text


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_recipe_for_v5e(tmp_path):
    file = tmp_path / "plan.json"
    config = str(CONFIGS / "pretrain_xs.yaml")
    assert main(["--config", config, "--topology", "v5e:16x16", "--json", str(file)]) == 0
    plan = json.loads(file.read_text())
    assert plan["fits"] and plan["devices"] == 256
    assert plan["hbm_capacity_bytes"] == int(15.75 * 2**30)
    assert not any(one["in_loop"] for one in plan["collectives"])
    assert {one["axis"] for one in plan["collectives"]} == {"data"}
    documents = 32768 * 384 * 4
    gathered = [one for one in plan["collectives"] if one["op"] == "all-gather"]
    assert [one["bytes"] for one in gathered if one["bytes"] > 2**20] == [documents]
    assert plan["pairs_per_second"] * plan["projected_step_seconds"] == pytest.approx(32768)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_batch_that_does_not_fit_is_refused(tmp_path):
    file = tmp_path / "plan.json"
    config = str(CONFIGS / "pretrain_l.yaml")
    sets = ["--set", "train.passes=one", "--set", "train.microbatch=16"]
    assert main(["--config", config, "--topology", "v5e:4x4", "--json", str(file), *sets]) == 0
    plan = json.loads(file.read_text())
    assert not plan["fits"] and "RESOURCE_EXHAUSTED" in plan["refused"]
    assert plan["hbm_bytes_per_chip"] > plan["hbm_capacity_bytes"]
