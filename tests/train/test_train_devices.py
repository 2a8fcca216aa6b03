"""The same run on one device, on several, and on several processes."""

import json
import os

import jax
import numpy as np
import pytest

from arcticjax.config import load_config
from arcticjax.parallel import mesh as meshes
from arcticjax.step import activations
from arcticjax.train import setup
from tests import tiny
from tests.train.running import BARE, finish, losses, start, train


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Eight steps on one device."""
    folder = tmp_path_factory.mktemp("short")
    train(tiny.run_config(folder, **BARE))
    return folder


def test_encoding_once_or_twice_is_the_same_run(short, tmp_path):
    train(tiny.run_config(tmp_path, **{"train.passes": "two"}, **BARE))
    one, two = (
        json.loads((folder / "run" / "result.json").read_text())["compiled_shapes"][0]
        for folder in (short, tmp_path)
    )
    assert (one["passes"], two["passes"]) == ("one", "two")
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
    assert ready.program.passes == passes
    assert activations.buffer_bytes(ready.program.kept) == (kept if passes == "one" else 0)


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
