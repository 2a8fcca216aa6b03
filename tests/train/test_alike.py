"""Processes of one run that were not started alike, and what they compare."""

import json

import numpy as np
import pytest

from arcticjax.config import load_config
from arcticjax.parallel import fingerprint
from arcticjax.train import alike
from launch.local import environments
from tests import tiny
from tests.train.running import finish, start

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture
def compared(monkeypatch):
    """What this process would have compared: (moment, values)."""
    found = []

    def check(when, values, **_):
        found.append((when, json.loads(json.dumps(values()))))

    monkeypatch.setattr(fingerprint, "check", check)
    return found


def test_where_files_lie_may_differ_and_nothing_else(tmp_path, compared):
    alike.check_start(load_config(tiny.run_config(tmp_path)))
    own = {"run.directory": "/elsewhere", "data.cache": "/tmp/c", "data.threads": 7}
    alike.check_start(load_config(tiny.run_config(tmp_path, **own, **{"data.prefetch": 5})))
    alike.check_start(load_config(tiny.run_config(tmp_path, **{"evaluation.demo_top": 9})))
    one, other, changed = [values for _, values in compared]
    assert one == other != changed


def test_a_batch_is_known_by_its_records_and_their_devices(compared):
    whole = tiny.builder(4)(5)
    alike.check_batch(whole)
    alike.check_batch(tiny.builder(4, local=[2, 3])(5))
    alike.check_batch(tiny.builder(4, seed=4)(5))
    whole.dealt.pairs_Nb[[0, 1]] = whole.dealt.pairs_Nb[[1, 0]]
    alike.check_batch(whole)
    np.random.default_rng(0).shuffle(whole.drawn.records)
    alike.check_batch(whole)
    one, part, seed, dealt, order = [values for _, values in compared]
    assert one == part and one["step"] == 6
    assert {name for name in one if one[name] != seed[name]} >= {"records"}
    assert {name for name in one if one[name] != dealt[name]} == {"layout"}
    assert {name for name in dealt if dealt[name] != order[name]} == {"records"}


def test_processes_with_another_config_stop_before_anything_else(tmp_path):
    """Another global batch would compile another program, and hang in its first collective."""
    file = tiny.run_config(tmp_path, **{"mesh.data": "auto"})
    first, second = environments(2)
    processes = [
        start(file, environment=first),
        start(file, "run.seed=4", "train.global_batch=8", environment=second),
    ]
    for process in processes:
        output = finish(process, 2)
        assert "error: at the start: processes 0 (" in output
        assert "\n  run.seed: 3 in process 0; 4 in process 1\n" in output
        assert "\n  train.global_batch: 16 in process 0; 8 in process 1\n" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_with_other_data_stop_before_training(tmp_path):
    """Paths are relative, and each process stands in its own folder. By default, test_train_devices
    sees that the data is compared, and the test above that what differs stops all processes."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        tiny.parquet(folder / "pairs.parquet", seed, 64)
    sources = [{"name": "a", "path": "pairs.parquet"}]
    file = tiny.run_config(tmp_path, **{"mesh.data": "auto", "data.sources": sources})
    processes = [
        start(file, environment=one, folder=folder)
        for one, folder in zip(environments(2), folders, strict=True)
    ]
    for process in processes:
        output = finish(process, 2)
        assert "error: before training: processes 0 (" in output
        assert "\n  data_fingerprint: " in output
