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
WITHOUT_SCORING = ("evaluation.tasks=[]", "evaluation.every_steps=null")

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


def planned(recipe, slice_, folder, *sets):
    """What `--json` holds."""
    file = folder / "plan.json"
    arguments = ["--config", str(CONFIGS / f"pretrain_{recipe}.yaml"), "--topology", slice_]
    for one in sets:
        arguments += ["--set", one]
    assert main([*arguments, "--json", str(file)]) == 0
    return json.loads(file.read_text())


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


def test_a_recipe_for_v5e(tmp_path):
    # What scoring compiles has tests of its own, and takes as long as the step; one pass compiles
    # for longer than two.
    plan = planned("xs", "v5e:16x16", tmp_path, *WITHOUT_SCORING, "train.passes=two")
    assert plan["fits"] and plan["devices"] == 256
    assert plan["hbm_capacity_bytes"] == int(15.75 * 2**30)
    assert not any(one["in_loop"] for one in plan["collectives"])
    assert {one["axis"] for one in plan["collectives"]} == {"data"}
    gathered = [one for one in plan["collectives"] if one["op"] == "all-gather"]
    documents = [one["bytes"] for one in gathered if "jvp(loss)" in one["purpose"]]
    assert documents == [32768 * 384 * 4]
    assert plan["pairs_per_second"] * plan["projected_step_seconds"] == pytest.approx(32768)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("slice_", ["v5e:16x16", "v5p:4x4x4", "v6e:8x8"])
@pytest.mark.parametrize("recipe", ["xs", "s", "m", "m_v15", "l"])
def test_every_recipe_fits_the_slices_it_names(recipe, slice_, tmp_path):
    plan = planned(recipe, slice_, tmp_path)
    assert plan["fits"] and plan["hbm_bytes_per_chip"] < 0.95 * plan["hbm_capacity_bytes"]
    assert [one["program"] for one in plan["compiled_shapes"]] == ["train_step", "encode", "search"]
    assert not any(one["in_loop"] for one in plan["collectives"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("recipe", ["m_long", "m_v2", "l_v2", "modernbert"])
def test_recipes_of_later_families_fit_the_slice_they_name(recipe, tmp_path):
    plan = planned(recipe, "v5e:16x16", tmp_path, *WITHOUT_SCORING)
    assert plan["fits"] and plan["hbm_bytes_per_chip"] < 0.95 * plan["hbm_capacity_bytes"]
    assert not any(one["in_loop"] for one in plan["collectives"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_batch_that_does_not_fit_is_refused(tmp_path):
    plan = planned("l", "v5e:4x4", tmp_path, "train.passes=one", "train.microbatch=16")
    assert not plan["fits"] and "RESOURCE_EXHAUSTED" in plan["refused"]
    assert plan["hbm_bytes_per_chip"] > plan["hbm_capacity_bytes"]
