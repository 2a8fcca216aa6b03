"""The training command on a tiny model.

From a config file to scores, plots, an export, and back after a stop.
"""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import yaml

from arcticjax import errors
from arcticjax.checkpoint.store import CheckpointStore
from arcticjax.config import load_config
from arcticjax.models.pretrained import load_pretrained
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.train import __main__ as command
from arcticjax.train.loop import Loop
from tests import tiny

# Steps take milliseconds: enough of them to be interrupted in the middle.
STEPS = 240
LONG = {"train.total_steps": STEPS, "checkpoint.save_every_steps": 40}
# Reading an export back imports torch, which takes longer than all the rest; plots take matplotlib.
BARE = {"export.enabled": False, "report.plots": False}


def train(file, *sets: str) -> None:
    arguments = ["--config", str(file)]
    for one in sets:
        arguments += ["--set", one]
    command.main(arguments)


def start(
    file, *sets: str, devices: int = 1, environment: dict[str, str] | None = None
) -> subprocess.Popen:
    """The command as a user types it, in its own process."""
    arguments = [sys.executable, "-m", "arcticjax.train", "--config", str(file)]
    for one in sets:
        arguments += ["--set", one]
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        arguments,
        env={**os.environ, "XLA_FLAGS": flags, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def lines(folder) -> list[dict]:
    return [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]


def losses(folder) -> list[tuple[int, str, float]]:
    return [(line["step"], line["source"], line["loss"]) for line in lines(folder)]


def weights(folder):
    return CheckpointStore(folder / "run" / "checkpoints").restore_params()


def same(left, right) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without interruption, by the command."""
    folder = tmp_path_factory.mktemp("straight")
    finish(start(tiny.run_config(folder, **LONG)))
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Eight steps on one device."""
    folder = tmp_path_factory.mktemp("short")
    train(tiny.run_config(folder, **BARE))
    return folder


def test_a_run_leaves_what_the_documentation_promises(straight):
    run = straight / "run"
    result = json.loads((run / "result.json").read_text())
    assert set(result) == {
        "status", "steps", "pairs", "seconds", "seconds_to_first_step", "pairs_per_second",
        "tokens_per_second", "fill", "compiled_shapes", "peak_memory_bytes", "evaluations",
        "export",
    }  # fmt: skip
    assert (result["status"], result["steps"], result["pairs"]) == ("done", STEPS, STEPS * 16)
    assert 0.5 < result["fill"] <= 1
    assert result["evaluations"]["before"]["task"] != result["evaluations"]["after"]["task"]
    assert set(result["evaluations"]["after"]["task"]) == {
        "ndcg_at_10",
        "mrr_at_10",
        "recall_at_100",
    }
    metrics = lines(straight)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert {line["source"] for line in metrics} == {"a", "b"}
    for field in (
        "loss", "learning_rate", "gradient_norm", "accuracy", "fill", "pairs_per_second",
        "tokens_per_second", "data_wait_fraction",
    ):  # fmt: skip
        assert all(isinstance(line[field], float) for line in metrics), field
    assert (run / "report" / "loss_and_ndcg.png").read_bytes()[:4] == b"\x89PNG"
    assert load_config(run / "config.yaml") == load_config(straight / "config.yaml")
    exported = load_pretrained(run / "export")
    assert exported.contract.pooling == "mean"
    assert same(exported.params, weights(straight))
    model = CheckpointStore(run / "checkpoints").read_meta()["model"]
    assert model["tokenizer_sha256"] == TextTokenizer.from_file(run / "tokenizer").sha256
    assert json.loads((run / "export" / "certificate.json").read_text())["passed"]


def test_a_finished_run_is_left_as_it_is(straight):
    before = (straight / "run" / "result.json").stat().st_mtime_ns
    output = finish(start(straight / "config.yaml"))
    assert f"finished at step {STEPS}" in output
    assert (straight / "run" / "result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("kill_at", [30, 130])
def test_a_killed_run_resumes_bit_for_bit(straight, tmp_path, kill_at):
    """SIGKILL as soon as `kill_at` steps are reported; the same command then gives the straight
    run's bits."""
    file = tiny.run_config(tmp_path, **LONG, **BARE)
    process = start(file)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= kill_at:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    finish(start(file))
    assert losses(tmp_path) == losses(straight)
    assert same(weights(tmp_path), weights(straight))


def test_a_terminated_run_saves_exits_42_and_resumes_bit_for_bit(straight, tmp_path):
    file = tiny.run_config(tmp_path, **LONG | BARE | {"checkpoint.save_every_steps": 1000})
    process = start(file)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 60:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.002)
    output = finish(process, 42)
    assert "asked to stop: saved step" in output.splitlines()[-1]
    finish(start(file))
    assert losses(tmp_path) == losses(straight)
    assert same(weights(tmp_path), weights(straight))


def test_eight_devices_give_the_run_of_one(short, tmp_path):
    finish(start(tiny.run_config(tmp_path, **{"mesh.data": 8}, **BARE), devices=8))
    close(losses(short), losses(tmp_path))


def test_two_processes_of_two_devices_give_the_run_of_one(short, tmp_path):
    """Both on loopback; only process 0 writes and talks."""
    file = tiny.run_config(tmp_path, **{"mesh.data": "auto"})
    port = 20000 + os.getpid() % 20000
    processes = [
        start(
            file,
            devices=2,
            environment={
                "ARCTICJAX_COORDINATOR": f"localhost:{port}",
                "ARCTICJAX_PROCESSES": "2",
                "ARCTICJAX_PROCESS": str(rank),
            },
        )
        for rank in range(2)
    ]
    outputs = [finish(process) for process in processes]
    assert "2 process(es)" in outputs[0]
    assert "step 8/8" not in outputs[1]
    close(losses(short), losses(tmp_path))
    one, two = (
        json.loads((folder / "run" / "result.json").read_text()) for folder in (short, tmp_path)
    )
    assert one["evaluations"]["before"] == two["evaluations"]["before"]


def close(left, right) -> None:
    assert [line[:2] for line in left] == [line[:2] for line in right]
    np.testing.assert_allclose([line[2] for line in left], [line[2] for line in right], rtol=1e-5)


def test_nothing_compiles_between_the_first_step_and_the_last(tmp_path, monkeypatch):
    compiled: list[str] = []
    heard: list[str] = []
    inside = False

    def listen(event: str, duration: float, **_: object) -> None:
        if event.endswith("backend_compile_duration"):
            (compiled if inside else heard).append(event)

    original = Loop.run

    def run(self, state, begin):
        nonlocal inside
        inside = True
        try:
            return original(self, state, begin)
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
    train(tiny.run_config(tmp_path, **{"data.stratified": False}, **BARE))
    assert {line["source"] for line in lines(tmp_path)} == {"all"}


def test_an_epoch_is_the_default_length(tmp_path):
    changes = {"train.total_steps": None, "optimizer.warmup_steps": 0}
    train(tiny.run_config(tmp_path, **changes, **BARE))
    sources = [line["source"] for line in lines(tmp_path)]
    assert sorted(sources) == ["a"] * 6 + ["b"] * 4  # 96 and 64 pairs in batches of 16


def test_the_first_layers_can_be_kept_and_bfloat16_exports_exactly(tmp_path):
    changes = {"model.keep_layers": 1, "train.precision": "bfloat16"}
    train(tiny.run_config(tmp_path, **changes), "train.total_steps=3")
    assert load_pretrained(tmp_path / "run" / "export").spec.num_layers == 1


def test_a_preset_starts_from_random_weights(tmp_path):
    folder = tmp_path / "words"
    tiny.tokenizer_folder(folder)
    file = tiny.run_config(
        tmp_path,
        **{
            "model": {"preset": "xs", "tokenizer": str(folder)},
            "evaluation.tasks": [],
            "train.total_steps": 1,
            "optimizer.warmup_steps": 0,
        },
        **BARE,
    )
    train(file)
    meta = CheckpointStore(tmp_path / "run" / "checkpoints").read_meta()
    assert meta["model"]["spec"]["num_hidden_layers"] == 6
    assert meta["contract"]["pooling"] == "cls"


def test_numbers_that_are_not_finite_stop_the_run_and_name_the_pairs(tmp_path):
    file = tiny.run_config(tmp_path, **BARE)
    train(file, "run.directory=" + str(tmp_path / "fine"), "train.total_steps=3")
    with pytest.raises(
        errors.NumericsError, match=r"step \d: .*source '[ab]', records \d+.*not applied"
    ):
        train(file, "optimizer.learning_rate=1e38", "optimizer.clip_norm=null")
    (dump,) = (tmp_path / "run").glob("nonfinite_step_*.json")
    assert len(json.loads(dump.read_text())["records"]) == 16


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
