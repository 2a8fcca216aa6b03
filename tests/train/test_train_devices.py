"""The same run on one device, on several, and on several processes."""

import json
import os

import numpy as np
import pytest

from tests import tiny
from tests.train.running import BARE, finish, losses, start, train


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Eight steps on one device."""
    folder = tmp_path_factory.mktemp("short")
    train(tiny.run_config(folder, **BARE))
    return folder


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
