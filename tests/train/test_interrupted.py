"""Runs that are broken off in one place or go on in another."""

import json

import pytest

from arcticjax import errors
from arcticjax.train import loop, run
from tests import tiny
from tests.train.running import BARE, losses, same, train, weights
from tests.train.test_train_devices import close

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiler")]

CHANGES = {"evaluation.tasks": [], **BARE}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    train(tiny.run_config(folder, **CHANGES))
    return folder


@pytest.fixture
def broken_off(tmp_path, monkeypatch):
    """The config of a run that was stopped in step 5, after the checkpoint of step 3."""
    file = tiny.run_config(tmp_path, **CHANGES)
    report = loop.Loop._report

    def interrupted(self, host, *rest):
        if host.step == 4:
            raise KeyboardInterrupt
        return report(self, host, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Loop, "_report", interrupted)
        train(file)
    return file


def test_a_run_goes_on_with_the_same_records_on_four_devices(straight, broken_off, tmp_path):
    train(broken_off, "mesh.data=4")
    assert "steps    3 of 8 done" in (tmp_path / "run" / "train.log").read_text()
    close(losses(straight), losses(tmp_path))


def test_where_the_time_went_covers_both_attempts(straight, broken_off, tmp_path):
    train(broken_off)
    assert same(weights(straight), weights(tmp_path))
    found = json.loads((tmp_path / "run" / "goodput.json").read_text())
    assert [one["steps"] for one in found["attempts"]] == [[0, 5], [3, 8]]
    assert found["parts"]["lost"] > 0
    assert sum(found["parts"].values()) == pytest.approx(found["seconds"], rel=1e-12)
    whole = json.loads((straight / "run" / "goodput.json").read_text())
    assert whole["parts"]["lost"] == whole["parts"]["down"] == 0
    # The clock of the result starts and stops inside.
    assert whole["seconds"] >= json.loads((straight / "run" / "result.json").read_text())["seconds"]
    assert all(whole["parts"][part] > 0 for part in ("start", "prepare", "compile", "step", "save"))


def test_what_follows_the_last_step_is_done_again(straight, tmp_path, monkeypatch):
    """A run that was stopped while it exports has its last checkpoint and no result yet."""
    file = tiny.run_config(tmp_path, **CHANGES)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "_export", interrupted)
        train(file)
    assert not (tmp_path / "run" / "result.json").exists()
    train(file)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("done", 8)
    assert same(weights(straight), weights(tmp_path))
    assert losses(straight) == losses(tmp_path)


@pytest.mark.parametrize("steps", [6, 12])
def test_the_number_of_steps_stays(broken_off, steps):
    with pytest.raises(errors.ConfigError, match=rf"train.total_steps: 8 in the run, {steps} now"):
        train(broken_off, f"train.total_steps={steps}")
