"""The same run on one device, on several, and on several processes."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from arcticjax.config import load_config
from arcticjax.parallel import fingerprint
from arcticjax.parallel import mesh as meshes
from arcticjax.step import activations
from arcticjax.train import setup
from launch.local import environments
from tests import tiny
from tests.train.running import BARE, ROOT, UNSCORED, finish, losses, start, train

pytestmark = pytest.mark.usefixtures("quick_compiler")
ONE_DEVICE = "--xla_force_host_platform_device_count=1"


@pytest.fixture(scope="module")
def compared():
    """What the processes of the run `short` would compare, were there several: moment, values."""
    return []


@pytest.fixture(scope="module")
def short(tmp_path_factory, compared):
    """Eight steps on one device."""

    def check(when, values, **_):
        compared.append((when, values()))

    folder = tmp_path_factory.mktemp("short")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "check", check)
        train(tiny.run_config(folder, **{"mesh.check_every_steps": 3}, **BARE))
    return folder


def test_a_run_compares_its_processes_at_the_start_and_every_so_many_steps(short, compared):
    assert [when for when, _ in compared] == [
        "at the start",
        *["before training"] * 2,
        *[f"before step {step}" for step in (1, 3, 6)],
    ]
    start, prepared, resumed, *batches = [values for _, values in compared]
    assert start["run"]["seed"] == 3 and "directory" not in start["run"]
    assert start["code"] == fingerprint.code_version()
    assert prepared["total_steps"] == 8 and len(prepared["data_fingerprint"]) > 16
    assert prepared["evaluation"] == {"task": "40 queries, 40 documents"}
    assert resumed == {"resumed step": 0}
    assert [(one["step"], one["source"]) for one in batches] == [
        losses(short)[step - 1][:2] for step in (1, 3, 6)
    ]


def test_encoding_twice_on_eight_devices_is_the_run_of_one(short, tmp_path):
    changes = {"train.passes": "two", "mesh.data": "auto"}
    train(tiny.run_config(tmp_path, **changes, **UNSCORED))
    one, two = (
        json.loads((folder / "run" / "result.json").read_text())["compiled_shapes"][0]
        for folder in (short, tmp_path)
    )
    assert (one["passes"], two["passes"]) == ("one", "two")
    assert (one["devices"], two["devices"]) == (1, 8)
    assert one["kept_bytes"] > two["kept_bytes"] == 0
    close(losses(short), losses(tmp_path))


@pytest.mark.parametrize(
    ("room", "wanted", "passes"),
    [(4, "auto", "one"), (3.9, "auto", "two"), (None, "auto", "two"), (1, "one", "one")],
)
def test_activations_are_kept_where_memory_allows(tmp_path, monkeypatch, room, wanted, passes):
    """`room`: memory of a device over what would be kept."""
    config = load_config(tiny.run_config(tmp_path, **{"train.passes": wanted}))
    mesh = meshes.make_mesh(1)
    with jax.set_mesh(mesh):
        monkeypatch.setattr(meshes, "device_memory", lambda: 2**60)
        kept = activations.buffer_bytes(setup.prepare(config, mesh).program.kept)
        monkeypatch.setattr(meshes, "device_memory", lambda: room and int(room * kept))
        ready = setup.prepare(config, mesh)
    assert ready.program.encoding.passes == passes
    assert activations.buffer_bytes(ready.program.kept) == (kept if passes == "one" else 0)


def test_eight_devices_of_which_two_share_each_matrix_give_the_run_of_one(short, tmp_path):
    changes = {"mesh.data": "auto", "mesh.fsdp": 2}
    train(tiny.run_config(tmp_path, **changes, **UNSCORED))
    close(losses(short), losses(tmp_path))


def test_two_processes_of_two_devices_give_the_run_of_one(short, tmp_path):
    """Both on loopback, each a slice; only process 0 writes and talks."""
    changes = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.slices": 2, "mesh.check_every_steps": 3}
    changes["report.plots"] = False
    file = tiny.run_config(tmp_path, **changes)
    # Our own reader certifies: torch would take longer to import than all the rest.
    (tmp_path / "stubs").mkdir()
    (tmp_path / "stubs" / "sentence_transformers.py").write_text("raise ImportError")
    without = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "stubs"), ROOT])}
    processes = [start(file, devices=2, environment=one | without) for one in environments(2)]
    outputs = [finish(process) for process in processes]
    assert "2 process(es)" in outputs[0]
    assert "step 8/8" not in outputs[1]
    close(losses(short), losses(tmp_path))
    one, two = (
        json.loads((folder / "run" / "result.json").read_text()) for folder in (short, tmp_path)
    )
    assert one["evaluations"]["before"] == two["evaluations"]["before"]
    assert json.loads((tmp_path / "run" / "export" / "certificate.json").read_text())["passed"]


@pytest.mark.slow
def test_four_processes_of_the_launcher_in_two_slices_give_the_run_of_one_process(tmp_path):
    """As a user starts them, one device each; the one process has four."""
    one, four = (
        tiny.run_config(tmp_path / name, **{"mesh.data": 4, "mesh.slices": slices}, **UNSCORED)
        for name, slices in (("one", 1), ("four", 2))
    )
    finish(start(one, devices=4))
    command = [sys.executable, "-m", "arcticjax.train", "--config", str(four)]
    launched = subprocess.Popen(
        [sys.executable, "-m", "launch.local", "--processes", "4", "--", *command],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {ONE_DEVICE}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert "4 process(es)" in finish(launched)
    close(losses(tmp_path / "one"), losses(tmp_path / "four"))


def close(left, right) -> None:
    assert [line[:2] for line in left] == [line[:2] for line in right]
    np.testing.assert_allclose([line[2] for line in left], [line[2] for line in right], rtol=1e-5)
