"""The command on eight fake devices, in this process; one program is compiled for all tests."""

import dataclasses
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from arcticjax import errors
from arcticjax.config import load_config
from arcticjax.models.spec import PRESETS
from arcticjax.plan import planner, topology, workload
from arcticjax.plan.__main__ import main
from arcticjax.step import activations
from tests import tiny

# What a plan tells from a compiled program does not hang on the optimisations left out.
pytestmark = pytest.mark.usefixtures("quick_compiler")

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = {
    "xs": "xs",
    "s": "s",
    "m": "m",
    "m_v15": "m-v1.5",
    "m_long": "m-long",
    "l": "l",
    "m_v2": "m-v2",
    "l_v2": "l-v2",
    "modernbert": "modernbert-base",
}
# Batches of the largest recipes, and those planned for more slices than one.
LARGE_BATCHES = ("xs", "s", "m_v2", "l_v2")
OLDER = ("xs", "s", "m", "m_v15", "l")
# What makes a recipe small enough to compile in seconds.
SHRUNK = (
    "model.init=sentence-transformers/all-MiniLM-L6-v2",
    "model.keep_layers=1",
    "data.query_length=16",
    "data.document_length=16",
    "train.global_batch=16",
    "train.microbatch=1",
    "train.precision=float32",
    "evaluation.tasks=[]",
    "evaluation.every_steps=null",
)


def run(config, *options, sets=()):
    changes = [part for one in sets for part in ("--set", one)]
    return main(["--config", str(config), *options, *changes])


@pytest.fixture(scope="module")
def planned(tmp_path_factory, quick_compiler):
    """(plan as JSON, file) of a tiny run on eight devices, with its evaluation."""
    folder = tmp_path_factory.mktemp("plan")
    config = tiny.run_config(folder, **{"mesh.data": "auto"})
    written = ("--json", str(folder / "plan.json"), "--hlo", str(folder / "step.hlo"))
    assert run(config, "--topology", "cpu:8", "--fit", *written) == 0
    return json.loads((folder / "plan.json").read_text()), config


def test_the_fields_that_scripts_read(planned):
    plan, _ = planned
    assert plan["fits"] is True
    assert plan["hbm_bytes_per_chip"] == sum(plan["hbm_parts"].values())
    assert plan["hbm_bytes_per_chip"] < plan["hbm_capacity_bytes"]
    assert plan["fit"] == {"changes": [], "plan": None}
    # No table has the limits of this machine: nothing is projected.
    assert plan["projected_step_seconds"] is plan["pairs_per_second"] is plan["run"] is None
    assert 0.5 < plan["fill"] <= 1
    programs = [one["program"] for one in plan["compiled_shapes"]]
    assert programs == ["train_step", "encode", "search"]
    assert all(one["memory_bytes"] > 0 for one in plan["compiled_shapes"])
    step, encode, search = plan["compiled_shapes"]
    assert search["documents"] == 40
    # While scoring runs, the state and what the step keeps stay on the device.
    parts = plan["hbm_parts"]
    kept = parts["optimizer"] + parts["kept_activations"]
    assert encode["memory_in_run_bytes"] == pytest.approx(encode["memory_bytes"] + kept, abs=64)
    state = kept + parts["parameters"]
    assert search["memory_in_run_bytes"] == pytest.approx(search["memory_bytes"] + state, abs=64)
    assert "memory_in_run_bytes" not in step


def test_the_program_as_compiled(planned):
    """Scopes name its parts, for those who read it or a profile."""
    plan, config = planned
    text = (config.parent / "step.hlo").read_text()
    assert text.startswith("HloModule jit_train_step")
    for scope in ("embeddings", "attention", "mlp", "norm", "loss", "optimizer"):
        assert re.search(rf'op_name="jit\(train_step\)[^"]*\b{scope}\b', text), scope
    assert text.count(" all-gather(") == sum(
        one["op"] == "all-gather" for one in plan["collectives"]
    )


def test_parts_of_the_memory(planned):
    plan, _ = planned
    parts, params = plan["hbm_parts"], 4 * tiny.SPEC.parameter_count()
    assert parts["parameters"] == params
    # A device's eighth of two numbers a parameter, with padding, and two counts of steps.
    assert 2 * params / 8 < parts["optimizer"] < 1.5 * (2 * params / 8)
    assert parts["kept_activations"] == plan["compiled_shapes"][0]["kept_bytes"] > 0
    assert parts["gathered_documents"] == 2 * 16 * 32 * 4


def test_the_collectives_of_a_step(planned):
    """Documents gathered once and scattered back once, gradients scattered and parameters gathered
    once; nothing in a loop."""
    plan, _ = planned
    assert {one["axis"] for one in plan["collectives"]} == {"data"}
    assert not any(one["in_loop"] for one in plan["collectives"])
    size = Counter()
    for one in plan["collectives"]:
        size[one["op"]] += one["bytes"]
    least = 16 * 32 * 4 + 4 * tiny.SPEC.parameter_count()
    for op in ("all-gather", "reduce-scatter"):
        assert least <= size[op] <= 1.5 * least
    assert size["all-reduce"] <= 64
    assert set(size) == {"all-gather", "reduce-scatter", "all-reduce"}


@pytest.mark.slow
def test_a_guide_is_part_of_the_plan(planned, tmp_path):
    """Its parameters on every device, and one all-gather of its documents more."""
    plan, config = planned
    spec = dataclasses.replace(tiny.SPEC, hidden_size=16, num_layers=1, num_heads=2)
    guide = tiny.model_folder(tmp_path / "guide", spec=spec)
    sets = (f"loss.guide={{model: {guide}}}", "evaluation.tasks=[]")
    assert run(config, "--topology", "cpu:8", "--json", str(tmp_path / "p.json"), sets=sets) == 0
    guided = json.loads((tmp_path / "p.json").read_text())
    parts = guided["hbm_parts"]
    assert parts["guide"] == 4 * spec.parameter_count()
    assert parts["gathered_documents"] == 16 * (2 * 32 + 16) * 4
    assert guided["hbm_bytes_per_chip"] == sum(parts.values())
    assert guided["hbm_bytes_per_chip"] > plan["hbm_bytes_per_chip"] + parts["guide"]
    found = [Counter((one["op"], one["bytes"]) for one in p["collectives"]) for p in (guided, plan)]
    assert found[0] - found[1] == {("all-gather", 16 * 16 * 4): 1}
    assert not found[1] - found[0]
    assert any(note.startswith("guide: ") for note in guided["notes"])


def test_it_is_said_in_words(planned, capsys, monkeypatch):
    """And a plan that does not fit names what to try, in order."""
    plan, config = planned
    capsys.readouterr()
    monkeypatch.setattr(topology, "memory", lambda target: plan["hbm_bytes_per_chip"] - 1)
    sets = ("train.passes=one", "evaluation.tasks=[]")
    assert run(config, "--topology", "cpu:8", sets=sets) == 0
    said = capsys.readouterr().out
    assert "cpu:8 (8 x cpu): does NOT fit" in said
    assert "all-gather over data: 2.00 KiB" in said
    assert "not projected" in said
    tries = [line for line in said.splitlines() if line.startswith("try ")]
    assert tries[:2] == [
        "try      --set train.microbatch=1",
        "try      --set train.passes=two",
    ]


@pytest.mark.slow
def test_scoring_that_does_not_fit_is_made_to(planned, capsys, monkeypatch, tmp_path):
    """The step fits, and what it keeps leaves scoring no room."""
    plan, config = planned
    _, *scoring = plan["compiled_shapes"]
    largest = max(one["memory_in_run_bytes"] for one in scoring)
    room = largest - plan["hbm_parts"]["kept_activations"]
    monkeypatch.setattr(planner.Plan, "train_fits", property(lambda plan: True))
    monkeypatch.setattr(topology, "memory", lambda target: room)
    sets, file = ("train.passes=one",), tmp_path / "plan.json"
    assert run(config, "--topology", "cpu:8", "--fit", "--json", str(file), sets=sets) == 0
    found = json.loads(file.read_text())
    assert not found["fits"] and found["fit"]["changes"] == ["train.passes=two"]
    assert "fits by  --set train.passes=two" in capsys.readouterr().out


MINING = {"input": "x", "output": "out", "top_k": 50, "document_block": 2000, "shard": 100}


@pytest.fixture(scope="module")
def mined(tmp_path_factory):
    """(plan as JSON, config file) of mining with a tiny teacher on eight devices."""
    folder = tmp_path_factory.mktemp("mine")
    teacher = str(tiny.model_folder(folder / "teacher"))
    config = folder / "mine.yaml"
    config.write_text(json.dumps({"teacher": teacher, **MINING}))
    options = ("--mine", "300/9000", "--topology", "cpu:8", "--json", str(folder / "plan.json"))
    assert run(config, *options) == 0
    return json.loads((folder / "plan.json").read_text()), config


def test_mining_compiles_what_it_runs(mined):
    plan, _ = mined
    encode, search = plan["compiled_shapes"]
    assert (encode["program"], encode["row_length"]) == ("encode", 32)
    assert (plan["document_block"], plan["blocks"]) == (2000, 5)
    # A whole tile of 4,096 is the least that a device holds.
    assert (search["documents_per_device"], search["top_k"]) == (4096, 50)
    params = 4 * tiny.SPEC.parameter_count()
    assert search["memory_bytes"] > 4 * 4096 * 32
    assert search["memory_in_run_bytes"] == search["memory_bytes"] + params
    most = max(search["memory_in_run_bytes"], encode["memory_bytes"])
    assert plan["fits"] and plan["hbm_bytes_per_chip"] == most


def test_a_block_of_documents_that_does_not_fit_is_halved(mined, capsys, monkeypatch):
    plan, config = mined
    monkeypatch.setattr(topology, "memory", lambda target: plan["hbm_bytes_per_chip"] + 2**16)
    options = ("--mine", "300/1000000", "--topology", "cpu:8", "--fit")
    assert run(config, *options, sets=("document_block=100000",)) == 0
    said = capsys.readouterr().out
    assert "does NOT fit" in said
    assert "fits by  --set document_block=25000" in said


def test_without_a_topology_it_plans_for_this_machine(planned, tmp_path):
    plan, config = planned
    file = tmp_path / "plan.json"
    assert run(config, "--json", str(file), sets=("evaluation.tasks=[]",)) == 0
    local = json.loads(file.read_text())
    assert (local["topology"], local["devices"]) == ("local", 8)
    assert local["hbm_parts"] == plan["hbm_parts"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_of_the_sizes_and_settings_they_name(recipe):
    config = load_config(CONFIGS / f"pretrain_{recipe}.yaml")
    found = workload.describe(config)
    assert found.spec == PRESETS[RECIPES[recipe]]  # with CLS pooling
    assert (config.data.query_length, config.data.document_length) == (32, 256)
    assert config.train.global_batch == (32768 if recipe in LARGE_BATCHES else 16384)
    assert config.train.precision == "bfloat16"
    text = (CONFIGS / f"pretrain_{recipe}.yaml").read_text()
    for name in ("v5e:16x16", "v5p:4x4x4", "v6e:8x8") if recipe in OLDER else ("v5e:16x16",):
        target = topology.parse(name)
        assert name in text and config.train.global_batch % (target.devices or 256) == 0


def test_a_shrunk_recipe_plans_on_fake_devices(tmp_path):
    file = tmp_path / "plan.json"
    sets = (*SHRUNK, "train.passes=two")
    run(CONFIGS / "pretrain_l.yaml", "--topology", "cpu:8", "--json", str(file), sets=sets)
    plan = json.loads(file.read_text())
    assert plan["fits"] and plan["devices"] == 8
    assert plan["hbm_parts"]["kept_activations"] == 0
    assert plan["compiled_shapes"][0]["passes"] == "two"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--topology", "v5e"), "v5e:16x16"),
        (("--topology", "cpu:8", "--lengths", "12"), "--lengths"),
        (("--topology", "cpu:8", "--mine", "12"), "--mine"),
        (("--topology", "cpu:8", "--lengths", "12/0"), "--lengths"),
        (("--topology", "cpu:8", "--efficiency", "2"), "--efficiency"),
        (("--topology", "cpu:8", "--json", "/no/such/folder/plan.json"), "--json: no folder"),
        (("--topology", "cpu:8", "--hlo", "/no/such/folder/step.hlo"), "--hlo: no folder"),
        (("--topology", "cpu:8", "--set", "train.global_batch=12"), "do not divide among 8"),
        (("--topology", "cpu:8", "--set", "mesh.data=16"), "16 devices, but 8 are at hand"),
        (("--topologi", "cpu:8"), "--help"),
    ],
)
def test_mistakes_are_explained(planned, options, words):
    with pytest.raises(errors.ConfigError, match=words):
        run(planned[1], *options)


def test_kept_programs_are_not_compiled_again(planned, monkeypatch):
    config = load_config(planned[1], ["evaluation.tasks=[]"])
    compiled = []
    stand_in = planner.Compiled(seconds=0, argument_bytes=0, memory_bytes=1, temporary_bytes=0)
    monkeypatch.setattr(
        planner, "compile_program", lambda label, *_: compiled.append(label) or stand_in
    )
    eight = planner.Planner(topology.parse("cpu:8"))
    for sets in ([], ["run.directory=elsewhere"], ["train.passes=two"], []):
        eight.plan(load_config(planned[1], ["evaluation.tasks=[]", *sets]))
    assert len(compiled) == 2
    assert activations.buffer_bytes([]) == 0 and config.train.passes == "auto"


FINETUNING = {**RECIPES, "arctic_e5_base": "m"}


@pytest.mark.parametrize("recipe", FINETUNING)
def test_fine_tuning_recipes_are_of_the_settings_they_name(recipe):
    path = CONFIGS / f"finetune_{recipe}.yaml"
    size, text = FINETUNING[recipe], path.read_text()
    base = next(name for name, of in workload.PUBLISHED.items() if of == size)
    config = load_config(path, [f"model.init={base}"])
    found = workload.describe(config)
    assert found.spec == PRESETS[size]
    assert (config.data.query_length, config.data.document_length) == (512, 512)
    assert not config.loss.in_batch_negatives
    [name] = re.findall(r"--topology (\S+)", text)
    assert config.train.global_batch % math.prod(topology.parse(name).sides) == 0
    # Ten negatives and up to three positives of each query.
    shapes = [one.select(np.arange(4), 0, 0.0).documents_BC.shape for one in found.views]
    assert shapes == [(4, 10 + config.data.positives)]


def test_a_shrunk_fine_tuning_recipe_plans_without_sending_documents(tmp_path):
    file = tmp_path / "plan.json"
    sets = (*SHRUNK, "data.negatives.count=2", "train.passes=two")
    run(CONFIGS / "finetune_l.yaml", "--topology", "cpu:8", "--json", str(file), sets=sets)
    plan = json.loads(file.read_text())
    step = plan["compiled_shapes"][0]
    assert (step["positives"], step["negatives"], step["pairs_per_device"]) == (1, 2, 2)
    gathered = 16 * 3 * 384 * 4
    assert not any(one["op"] == "all-gather" and one["bytes"] == gathered
                   for one in plan["collectives"])  # fmt: skip
