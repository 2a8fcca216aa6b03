"""Steps that are not finite: the weights never see them, and the run goes on as it was told."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcticjax import errors
from arcticjax.checkpoint import CheckpointStore
from arcticjax.config import load_config
from arcticjax.parallel import mesh as meshes
from arcticjax.parallel.mesh import AXES
from arcticjax.step.objective import Objective
from arcticjax.train import setup, spikes
from tests import tiny
from tests.train.running import BARE, lines, same, train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiler")]

CHANGES = {"evaluation.tasks": [], "checkpoint.keep": 8, **BARE}


@pytest.fixture
def poison(tmp_path, monkeypatch):
    """Makes the loss of given steps, known by their tokens, not a number."""

    def make(*steps):
        config = load_config(tiny.run_config(tmp_path, **CHANGES))
        mesh = meshes.make_mesh(1)
        with jax.set_mesh(mesh):
            builder = setup.prepare(config, mesh).builder
        sums = [builder(step - 1).arrays["tokens"].sum() for step in range(1, 9)]
        assert len(set(sums)) == 8
        bad = jnp.array([sums[step - 1] for step in steps])

        def call(self, learned, vectors, batch):
            loss, found = original(self, learned, vectors, batch)
            tokens = jax.lax.psum(batch["tokens"].sum(), AXES)
            return loss * jnp.where((bad == tokens).any(), jnp.nan, 1.0), found

        monkeypatch.setattr(Objective, "__call__", call)

    original = Objective.__call__
    return make


def run(folder, directory, nonfinite, *sets):
    file = tiny.run_config(folder, **CHANGES)
    train(file, f"run.directory={folder / directory}", f"train.nonfinite={nonfinite}", *sets)
    return CheckpointStore(folder / directory / "checkpoints")


def test_skipping_leaves_the_weights_and_goes_on(tmp_path, poison, monkeypatch):
    poison(5)
    monkeypatch.setattr(spikes.Spikes, "look", lambda self, source, loss: f"odd {loss > 0}")
    store = run(tmp_path, "run", "skip", "checkpoint.save_every_steps=1")
    before, at, after = (store.restore_params(step) for step in (4, 5, 6))
    assert same(before, at) and not same(at, after)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(store.restore_params()))
    told = lines(tmp_path)
    assert told[4]["loss"] is None and told[4]["non_finite"]["loss"] == "nan"
    dump = json.loads((tmp_path / "run" / "nonfinite_step_5.json").read_text())
    assert (dump["source"], len(dump["records"])) == (told[4]["source"], 16)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["nonfinite_steps"], result["pairs"]) == (1, 7 * 16)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "1 of train.nonfinite_limit = 10" in log
    # What is not finite is no spike.
    assert result["loss_spikes"] == log.count(": odd True; the step stands") == 7
    assert "step 6: odd True" in log


@pytest.mark.parametrize(("bad", "lost"), [(5, (4, 5)), (6, (4, 5, 6)), (2, (1, 2))])
def test_rolling_back_is_the_run_without_the_steps_since_the_checkpoint(
    tmp_path, poison, bad, lost
):
    """The checkpoint is that of step 3, or none; the schedule goes on as if nothing was lost."""
    poison(bad)
    rolled = run(tmp_path, "run", "rollback")
    poison(*lost)
    skipped = run(tmp_path, "other", "skip")
    assert same(rolled.restore_params(), skipped.restore_params())
    assert [line["learning_rate"] for line in lines(tmp_path)] == [
        json.loads(line)["learning_rate"]
        for line in (tmp_path / "other" / "metrics.jsonl").read_text().splitlines()
    ]


def test_more_than_the_limit_is_an_error(tmp_path, poison):
    poison(3, 5, 7)
    with pytest.raises(errors.NumericsError, match=r"step 7: .*train.nonfinite_limit = 2\."):
        run(tmp_path, "run", "skip", "train.nonfinite_limit=2")
    # Counted over the whole run: the command again stops at the same step, having saved step 6.
    assert CheckpointStore(tmp_path / "run" / "checkpoints").steps()[-1] == 6
    with pytest.raises(errors.NumericsError, match=r"step 7: .*train.nonfinite_limit = 2\."):
        run(tmp_path, "run", "skip", "train.nonfinite_limit=2")
    run(tmp_path, "run", "skip", "train.nonfinite_limit=3")
