"""The training command on a tiny model: from a config file to scores, plots and an export."""

import dataclasses
import io
import json
import logging
import sys

import jax
import pytest
import yaml

from arcticjax import errors
from arcticjax.checkpoint.store import CheckpointStore
from arcticjax.config import load_config
from arcticjax.export import readers
from arcticjax.models.pretrained import load_pretrained
from arcticjax.models.spec import PRESETS
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.parallel import command as processes
from arcticjax.parallel import compilation_cache
from arcticjax.train import __main__ as command
from arcticjax.train.loop import Loop
from tests import tiny
from tests.torch_here import torch_here
from tests.train.running import BARE, UNSCORED, lines, same, train, weights

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of eight steps."""
    folder = tmp_path_factory.mktemp("done")
    with torch_here():
        train(tiny.run_config(folder))
    return folder


def test_a_run_leaves_what_the_documentation_promises(done):
    run = done / "run"
    result = json.loads((run / "result.json").read_text())
    assert set(result) == {
        "status", "steps", "pairs", "seconds", "seconds_to_first_step", "pairs_per_second",
        "tokens_per_second", "fill", "compiled_shapes", "peak_memory_bytes", "evaluations",
        "export", "nonfinite_steps",
    }  # fmt: skip
    assert (result["status"], result["steps"], result["pairs"]) == ("done", 8, 8 * 16)
    assert 0.5 < result["fill"] <= 1
    assert result["evaluations"]["before"]["task"] != result["evaluations"]["after"]["task"]
    assert set(result["evaluations"]["after"]["task"]) == {
        "ndcg_at_10",
        "mrr_at_10",
        "recall_at_100",
    }
    metrics = lines(done)
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert {line["source"] for line in metrics} == {"a", "b"}
    for field in (
        "loss", "learning_rate", "gradient_norm", "accuracy", "fill", "pairs_per_second",
        "tokens_per_second", "data_wait_fraction",
    ):  # fmt: skip
        assert all(isinstance(line[field], float) for line in metrics), field
    assert (run / "report" / "loss_and_ndcg.png").read_bytes()[:4] == b"\x89PNG"
    assert load_config(run / "config.yaml") == load_config(done / "config.yaml")
    exported = load_pretrained(run / "export")
    assert exported.contract.pooling == "mean"
    assert same(exported.params, weights(done))
    model = CheckpointStore(run / "checkpoints").read_meta()["model"]
    assert model["tokenizer_sha256"] == TextTokenizer.from_file(run / "tokenizer").sha256
    assert json.loads((run / "export" / "certificate.json").read_text())["passed"]


def test_a_finished_run_is_left_as_it_is(done, capsys):
    before = (done / "run" / "result.json").stat().st_mtime_ns
    train(done / "config.yaml")
    assert "finished at step 8" in capsys.readouterr().out
    assert (done / "run" / "result.json").stat().st_mtime_ns == before


def test_nothing_compiles_between_the_first_step_and_the_last(tmp_path, monkeypatch):
    compiled: list[str] = []
    heard: list[str] = []
    inside = False

    def listen(event: str, duration: float, **_: object) -> None:
        if event.endswith("backend_compile_duration"):
            (compiled if inside else heard).append(event)

    original = Loop.run

    def run(self, *arguments):
        nonlocal inside
        inside = True
        try:
            return original(self, *arguments)
        finally:
            inside = False

    monkeypatch.setattr(Loop, "run", run)
    jax.monitoring.register_event_duration_secs_listener(listen)
    train(
        tiny.run_config(
            tmp_path,
            **{"evaluation.every_steps": 2, "mesh.data": 2},
            **BARE,
        )
    )
    assert compiled == []
    assert heard  # before the first step there is something to hear


def test_each_step_is_drawn_from_one_source_unless_mixed(tmp_path):
    train(tiny.run_config(tmp_path, **{"data.stratified": False}, **UNSCORED))
    assert {line["source"] for line in lines(tmp_path)} == {"all"}


def test_an_epoch_is_the_default_length(tmp_path):
    changes = {"train.total_steps": None, "optimizer.warmup_steps": 0}
    train(tiny.run_config(tmp_path, **changes, **UNSCORED))
    sources = [line["source"] for line in lines(tmp_path)]
    assert sorted(sources) == ["a"] * 6 + ["b"] * 4  # 96 and 64 pairs in batches of 16


def test_the_first_layers_can_be_kept_and_bfloat16_exports_exactly(tmp_path, monkeypatch):
    # sentence-transformers takes as long as all the rest, and reads an export in other tests
    monkeypatch.setattr(readers, "torch_vectors", lambda folders, probes: None)
    changes = {"model.keep_layers": 1, "train.precision": "bfloat16", "report.plots": False}
    train(tiny.run_config(tmp_path, **changes), "train.total_steps=3")
    assert load_pretrained(tmp_path / "run" / "export").spec.num_layers == 1


def test_a_preset_starts_from_random_weights(tmp_path, monkeypatch):
    small = {"vocab_size": 120, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64}
    monkeypatch.setitem(PRESETS, "xs", dataclasses.replace(PRESETS["xs"], **small))
    folder = tmp_path / "words"
    tiny.tokenizer_folder(folder)
    file = tiny.run_config(
        tmp_path,
        **{
            "model": {"preset": "xs", "tokenizer": str(folder)},
            "train.total_steps": 1,
            "optimizer.warmup_steps": 0,
        },
        **UNSCORED,
    )
    train(file)
    meta = CheckpointStore(tmp_path / "run" / "checkpoints").read_meta()
    assert meta["model"]["spec"]["num_hidden_layers"] == 6
    assert meta["model"]["spec"]["hidden_size"] == 32
    assert meta["contract"]["pooling"] == "cls"


def test_numbers_that_are_not_finite_stop_the_run_and_name_the_pairs(tmp_path):
    file = tiny.run_config(tmp_path, **UNSCORED)
    with pytest.raises(
        errors.NumericsError, match=r"step \d: .*source '[ab]', records \d+.*not applied"
    ):
        train(file, "optimizer.learning_rate=1e38", "optimizer.clip_norm=null")
    (dump,) = (tmp_path / "run").glob("nonfinite_step_*.json")
    assert len(json.loads(dump.read_text())["records"]) == 16


@pytest.mark.parametrize("there", [True, False])
def test_messages_of_the_parts_are_shown_once_in_our_format_by_process_0(monkeypatch, there):
    """Whether or not a library put up a handler first."""
    root, shown = logging.Logger("root"), io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    if there:
        root.addHandler(logging.StreamHandler(shown))
    parts = logging.getLogger("arcticjax")
    monkeypatch.setattr(parts, "parent", root)
    monkeypatch.setattr(parts, "level", parts.level)
    monkeypatch.setattr(logging, "getLogger", lambda name=None: parts if name else root)
    processes.show_log()
    parts.info("tokenising")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    parts.info("of another process")
    parts.error("of any process")
    assert shown.getvalue() == "INFO: tokenising\nERROR: of any process\n"


def test_compiled_programs_are_kept_where_the_config_says(tmp_path, monkeypatch):
    asked = []

    def keep(folder):
        asked.append(folder)
        raise errors.ConfigError("far enough")

    monkeypatch.setattr(compilation_cache, "keep_compiled", keep)
    with pytest.raises(errors.ConfigError, match="far enough"):
        train(tiny.run_config(tmp_path), "run.compilation_cache=kept")
    assert asked == ["kept"]


def test_help_and_print_config_need_no_jax(tmp_path, capsys):
    file = tiny.run_config(tmp_path)
    assert (
        command.main(["--config", str(file), "--set", "train.total_steps=3", "--print-config"]) == 0
    )
    assert yaml.safe_load(capsys.readouterr().out)["train"]["total_steps"] == 3
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    assert "optimizer.learning_rate" in capsys.readouterr().out
