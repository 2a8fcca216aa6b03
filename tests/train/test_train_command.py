"""The training command on a tiny model: from a config file to scores, plots and an export."""

import contextlib
import dataclasses
import io
import json
import logging
import re
import sys

import jax
import numpy as np
import pytest
import yaml

from arcticjax import errors
from arcticjax.checkpoint.store import CheckpointStore
from arcticjax.config import load_config
from arcticjax.data.draw import Draw
from arcticjax.export.source import make_embedder, open_source
from arcticjax.models.presets import random_start
from arcticjax.models.pretrained import load_pretrained
from arcticjax.models.spec import PRESETS
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.parallel import command as processes
from arcticjax.parallel import compilation_cache
from arcticjax.parallel.mesh import make_mesh
from arcticjax.scoring.beir import load_task
from arcticjax.train import __main__ as command
from tests import tiny
from tests.torch_here import torch_here
from tests.train.running import UNSCORED, fails, lines, same, state, train, weights

pytestmark = pytest.mark.usefixtures("quick_compiler")


# Of the tasks' own words.
QUERIES = ["river stone fern", "hazel"]
CANARY = "hf_canaryCanaryCanaryCanary"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "GOOGLE_API_KEY")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of eight steps, and in shown.txt what its user saw."""
    folder = tmp_path_factory.mktemp("done")
    changes = {"evaluation.demo_queries": QUERIES, "checkpoint.keep": 1}
    shown = io.StringIO()
    with (
        torch_here(),
        contextlib.redirect_stderr(shown),
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in SECRETS:
            patch.setenv(name, CANARY)
        train(tiny.run_config(folder, **changes))
    (folder / "shown.txt").write_text(shown.getvalue())
    return folder


def test_no_secret_of_the_environment_is_written_into_a_run(done):
    """Checkpoints, config, logs, report, plots, card, what was shown: no file holds one."""
    files = [file for file in done.rglob("*") if file.is_file()]
    assert len(files) > 40
    assert [file for file in files if CANARY.encode() in file.read_bytes()] == []


def test_a_run_leaves_what_the_documentation_promises(done):
    run = done / "run"
    result = json.loads((run / "result.json").read_text())
    assert set(result) == {
        "status", "steps", "pairs", "seconds", "seconds_to_first_step", "pairs_per_second",
        "tokens_per_second", "fill", "compiled_shapes", "peak_memory_bytes", "evaluations",
        "export", "nonfinite_steps", "loss_spikes",
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


def test_a_finished_run_shows_its_scores_and_how_each_source_fares(done):
    shown = (done / "shown.txt").read_text()
    scores = json.loads((done / "run" / "result.json").read_text())["evaluations"]
    before, after = (scores[when]["task"]["ndcg_at_10"] for when in ("before", "after"))
    found = re.search(r"^task +nDCG@10 +(\S+) +(\S+) +(\S+)$", shown, re.M)
    assert found and found.groups() == (f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
    for source in "ab":
        own = [line for line in lines(done) if line["source"] == source]
        means = [sum(line[name] for line in own) / len(own) for name in ("loss", "accuracy")]
        found = re.search(rf"^{source} +(\d) +(\S+) +(\S+)$", shown, re.M)
        assert found and found.groups() == (str(len(own)), *(f"{mean:.4f}" for mean in means))


def test_the_answers_to_demo_queries_are_the_nearest_documents(done):
    task = load_task(done / "task")
    encoder = make_embedder(open_source(done / "run"), make_mesh(1))
    with jax.set_mesh(encoder.mesh):
        cosines = encoder.encode(QUERIES, "query") @ encoder.encode(task.documents).T
    shown = (done / "shown.txt").read_text()
    for query, row in zip(QUERIES, cosines, strict=True):
        found = re.search(rf"^query +{query}\n((  [\d.]+  .*\n)+)", shown, re.M)
        assert found
        answers = [line.split("  ")[1:] for line in found[1].splitlines()]
        best = np.argsort(-row)[:3]
        assert [text for _, text in answers] == [task.documents[n][:110] for n in best]
        np.testing.assert_allclose([float(one) for one, _ in answers], row[best], atol=1e-3)


def test_the_config_decides_the_draw(done):
    draw = Draw([96, 64], 16, 3)
    drawn = ["ab"[draw.at(step).source] for step in range(8)]
    assert [line["source"] for line in lines(done)] == drawn


def test_the_config_decides_the_learning_rates(done):
    """Two steps of warm-up, then down to zero at the eighth."""
    rates = [0.001, 0.002, *(0.002 * left / 6 for left in range(6, 0, -1))]
    np.testing.assert_allclose([line["learning_rate"] for line in lines(done)], rates, rtol=1e-6)


def test_the_config_decides_how_many_checkpoints_stay(done):
    assert CheckpointStore(done / "run" / "checkpoints").steps() == [8]


def test_an_epoch_is_the_default_length(tmp_path):
    changes = {"train.total_steps": None, "optimizer.warmup_steps": 0}
    train(tiny.run_config(tmp_path, **changes, **UNSCORED))
    sources = [line["source"] for line in lines(tmp_path)]
    assert sorted(sources) == ["a"] * 6 + ["b"] * 4  # 96 and 64 pairs in batches of 16


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """Two steps on mixed sources from a preset of tiny size; folder, and weights of its seed."""
    folder = tmp_path_factory.mktemp("preset")
    words = tiny.tokenizer_folder(folder / "words")
    small = {"vocab_size": 120, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64}
    changes = {
        "model": {"preset": "xs", "tokenizer": str(words)}, "train.total_steps": 2,
        "optimizer.warmup_steps": 0, "optimizer.weight_decay": 10, "optimizer.clip_norm": 1e-4,
        "checkpoint.save_every_steps": 1, "data.stratified": False,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "xs", dataclasses.replace(PRESETS["xs"], **small))
        train(tiny.run_config(folder, **changes, **UNSCORED))
        lengths = {"query_length": 16, "document_length": 32}
        return folder, random_start("xs", seed=3, tokenizer=words, **lengths).params


def test_a_preset_starts_from_random_weights(preset):
    folder, _ = preset
    meta = CheckpointStore(folder / "run" / "checkpoints").read_meta()
    assert meta["model"]["spec"]["num_hidden_layers"] == 6
    assert meta["model"]["spec"]["hidden_size"] == 32
    assert meta["contract"]["pooling"] == "cls"


def test_each_step_is_drawn_from_one_source_unless_mixed(preset, done):
    folder, _ = preset
    assert {line["source"] for line in lines(folder)} == {"all"}
    assert {line["source"] for line in lines(done)} == {"a", "b"}


def test_the_config_decides_seed_and_decay(preset):
    """Tokens that no text has get no gradient: they only decay, at the rate of each step."""
    folder, start = preset
    unseen = slice(4 + len(tiny.WORDS), None)
    decayed = start["embeddings"]["token"][unseen] * (1 - 0.002 * 10) * (1 - 0.001 * 10)
    found = weights(folder)["embeddings"]["token"][unseen]
    np.testing.assert_allclose(found, decayed, rtol=1e-5)


def test_the_config_decides_clipping(preset):
    """The first moment after the first step is a tenth of the clipped gradient."""
    folder, _ = preset
    assert lines(folder)[0]["gradient_norm"] > 1e-3
    moments = [leaf for name, leaf in state(folder, step=1).items() if "/mu/" in name]
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in moments))
    assert norm == pytest.approx(0.1 * 1e-4, rel=1e-4)


def test_numbers_that_are_not_finite_stop_the_run_and_name_the_pairs(tmp_path):
    file = tiny.run_config(tmp_path, **UNSCORED)
    sets = ("optimizer.learning_rate=1e38", "optimizer.clip_norm=null")
    fails(file, errors.NumericsError, r"step \d: .*source '[ab]', records \d+.*not applied", *sets)
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
