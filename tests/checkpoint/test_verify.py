"""`python -m arcticjax.checkpoint verify RUN`: what is good, what is damaged, and the exit code."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from arcticjax import errors
from arcticjax.checkpoint import CheckpointStore, __main__
from arcticjax.checkpoint.step_directories import StepDirectories

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with steps 1, 2 and 3."""
    run = tmp_path_factory.mktemp("saved") / "run"
    with CheckpointStore(run / "checkpoints", keep=3) as store:
        for step in (1, 2, 3):
            weights = jax.device_put(np.full(3000, step, np.float32))
            store.save(step, {"params": {"w": weights}}, {})
    return run


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def data_file(run, step):
    files = [path for path in (run / "checkpoints" / str(step)).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_good_steps_are_listed_with_their_size_and_nothing_changes(run, capsys):
    before = sorted(path for path in run.rglob("*"))
    assert __main__.main(["verify", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:3]] == [["step", str(n), "good"] for n in (1, 2, 3)]
    assert lines[3].endswith("all good; the run would go on from step 3")
    assert sorted(path for path in run.rglob("*")) == before
    __main__.main(["verify", str(run / "checkpoints")])
    assert capsys.readouterr().out.splitlines() == lines


def test_the_command_names_the_damaged_file_and_exits_4(run):
    """As a user types it: the last line says what would be lost."""
    file = data_file(run, 3)
    flip(file)
    done = subprocess.run(
        [sys.executable, "-m", "arcticjax.checkpoint", "verify", str(run)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 4
    name = str(file.relative_to(run / "checkpoints" / "3"))
    assert f"step 3  damaged  {name}: has other content" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert name in last and "would go on from step 2" in last
    assert (run / "checkpoints" / "3").exists()


def test_what_was_set_aside_is_told_and_none_good_is_4(run, capsys):
    directories = StepDirectories(run / "checkpoints")
    for step in (1, 2):
        data_file(run, step).unlink()
        problem = directories.verify(step)[0]
        assert problem is not None
        directories.mark_bad(step, problem)
    assert __main__.main(["verify", str(run)]) == 0
    assert "1.bad-missing-file  set aside" in capsys.readouterr().out
    data_file(run, 3).unlink()
    with pytest.raises(errors.CheckpointError, match="none of them is good"):
        __main__.main(["verify", str(run)])


def test_no_run_and_no_checkpoint(tmp_path):
    with pytest.raises(errors.ConfigError, match="no such directory"):
        __main__.main(["verify", str(tmp_path / "nowhere")])
    with pytest.raises(errors.CheckpointError, match="there is none"):
        __main__.main(["verify", str(tmp_path)])
    with pytest.raises(errors.ConfigError, match="--help"):
        __main__.main(["look", str(tmp_path)])


def test_a_step_that_a_live_run_deletes_meanwhile_is_no_damage(run, monkeypatch, capsys):
    original = StepDirectories.verify

    def verify(self, step, **options):
        if step == 1:
            shutil.rmtree(run / "checkpoints" / "1")
        return original(self, step, **options)

    monkeypatch.setattr(StepDirectories, "verify", verify)
    assert __main__.main(["verify", str(run)]) == 0
    assert "step 1 " not in capsys.readouterr().out
