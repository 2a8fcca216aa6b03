"""Fine-tuning as typed: the same on any devices and after a stop, and what it says."""

import json
import logging

import jax
import numpy as np
import pytest

from arcticjax import errors
from arcticjax.train import loop
from launch.local import environments
from tests.train import finetuning
from tests.train.running import UNSCORED, Heard, finish, lines, losses, same, start, train, weights

pytestmark = pytest.mark.usefixtures("quick_compiler")

# Thresholds that move at every third of a run, and other negatives in every epoch.
MOVING = {
    "count": 2,
    "minimum": 1,
    "sampling": "random",
    "thresholds": {"upper": {"kind": "absolute", "value": 0.9}},
    "curriculum": {"shape": "linear", "levels": 2,
                   "points": [{"start": 0.0, "upper": 0.6}, {"start": 0.7, "upper": 0.9}]},
}  # fmt: skip
OWN = {"data.negatives": MOVING, "checkpoint.save_every_steps": 2, **UNSCORED}
SHARED = {"loss.in_batch_negatives": True, **UNSCORED}
DISTILLED = {"loss.distillation": {"kind": "kl", "weight": 0.5}, **UNSCORED}


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The folder of six steps on one device, each query against its own negatives; what was
    compiled for it, and what of that between its first step and its last."""
    folder, heard, inside = tmp_path_factory.mktemp("own"), Heard(), []
    whole_loop, logger = loop.Loop.run, logging.getLogger("jax")

    def run(self, *arguments):
        before = len(heard.programs)
        try:
            return whole_loop(self, *arguments)
        finally:
            inside.extend(heard.programs[before:])

    jax.clear_caches()  # else what another test compiled would not be heard
    with pytest.MonkeyPatch.context() as patch, jax.log_compiles():
        patch.setattr(loop.Loop, "run", run)
        logger.addHandler(heard)
        train(finetuning.config(folder, **OWN))
        logger.removeHandler(heard)
    return folder, heard.programs, inside


@pytest.fixture(scope="module")
def own(watched):
    return watched[0]


def test_it_learns_and_announces_its_documents(own):
    result = json.loads((own / "run" / "result.json").read_text())
    step = result["compiled_shapes"][0]
    assert (step["positives"], step["negatives"]) == (2, 2)
    assert losses(own)[-1][2] < losses(own)[0][2]


def test_one_announced_program_serves_the_curriculum(watched):
    """Whatever else is compiled makes or converts one array, and that before the first step."""
    folder, programs, inside = watched
    (said,) = json.loads((folder / "run" / "result.json").read_text())["compiled_shapes"]
    log = (folder / "run" / "train.log").read_text()
    assert log.count(" cut      ") == 6  # three stages of each source
    (types,) = [types for name, types in programs if name == "train_step"]
    tokens = tuple(said[name] for name in ("devices", "microbatches", "rows", "row_length"))
    assert said["program"] == "train_step" and tokens in [one.shape for one in types]
    assert all(len(types) <= 1 for name, types in programs if name != "train_step")
    assert inside == []


def test_eight_devices_give_the_run_of_one(own, tmp_path):
    train(finetuning.config(tmp_path, **OWN, **{"mesh.data": "auto"}))
    close(losses(own), losses(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [SHARED, DISTILLED], ids=["shared", "own"])
def test_two_processes_of_two_devices_give_the_run_of_one(tmp_path, changes):
    """With documents shared between devices, and with none: hard negatives and a teacher alone."""
    train(finetuning.config(tmp_path / "one", **changes))
    file = finetuning.config(tmp_path / "two", **changes, **{"mesh.data": "auto"})
    outputs = [
        finish(process)
        for process in [start(file, devices=2, environment=one) for one in environments(2)]
    ]
    assert "2 process(es)" in outputs[0]
    assert "cut      a: 48 of 48 queries kept" in outputs[0]
    close(losses(tmp_path / "one"), losses(tmp_path / "two"))


def test_an_interrupted_run_resumes_bit_for_bit(own, tmp_path, monkeypatch):
    """In the middle of its curriculum."""
    file = finetuning.config(tmp_path, **OWN)
    report = loop.Loop._report

    def interrupted(self, host, *rest):
        if host.step == 3:
            raise KeyboardInterrupt
        report(self, host, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Loop, "_report", interrupted)
        train(file)
    assert len(losses(tmp_path)) < 6
    train(file)
    assert losses(tmp_path) == losses(own)
    assert same(weights(tmp_path), weights(own))


def test_other_thresholds_need_no_other_lists(own):
    """Another run on the same cache, with other thresholds, writes no lists; the same run refuses
    them."""
    cache = own / "run" / "cache"
    before = sorted(cache.rglob("*"))
    changes = {**OWN, "data.negatives": {"count": 1}, "data.cache": str(cache)}
    file = finetuning.config(own / "other", **changes)
    for name in "ab":  # the same files, not copies
        text = file.read_text().replace(str(own / "other" / name), str(own / name))
        file.write_text(text)
    train(file, "train.total_steps=3")
    assert sorted(cache.rglob("*")) == before

    with pytest.raises(errors.ConfigError, match=r"data\.negatives\.sampling"):
        train(own / "config.yaml", "data.negatives.sampling=top")


def test_too_few_negatives_stop_it_before_the_first_step(tmp_path):
    file = finetuning.config(tmp_path, **{**OWN, "data.negatives": {"count": 7}})
    with pytest.raises(errors.DataError, match=r"no query has 7 hard.*\n.*48 with too few"):
        train(file)
    assert not any("loss" in line for line in lines(tmp_path))


def close(left, right) -> None:
    assert [line[:2] for line in left] == [line[:2] for line in right]
    np.testing.assert_allclose([line[2] for line in left], [line[2] for line in right], rtol=1e-5)
