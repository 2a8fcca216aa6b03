"""Fine-tuning as typed: the same on any devices and after a stop, and what it says."""

import json

import numpy as np
import pytest

from tests.train import finetuning
from tests.train.running import BARE, cluster, finish, losses, start, train

pytestmark = pytest.mark.usefixtures("quick_compiler")

KINDS = {
    "own": {},
    "shared": {"loss.in_batch_negatives": True},
}


@pytest.fixture(scope="module", params=KINDS)
def short(request, tmp_path_factory):
    """Six steps on one device; (folder, changes)."""
    folder = tmp_path_factory.mktemp("short")
    changes = {**KINDS[request.param], **BARE}
    train(finetuning.config(folder, **changes))
    return folder, changes


def test_it_learns_and_announces_its_documents(short):
    folder, _ = short
    result = json.loads((folder / "run" / "result.json").read_text())
    step = result["compiled_shapes"][0]
    assert (step["positives"], step["negatives"]) == (2, 3)
    assert losses(folder)[-1][2] < losses(folder)[0][2]


def test_eight_devices_give_the_run_of_one(short, tmp_path):
    folder, changes = short
    finish(start(finetuning.config(tmp_path, **changes, **{"mesh.data": "auto"}), devices=8))
    close(losses(folder), losses(tmp_path))


def test_two_processes_of_two_devices_give_the_run_of_one(short, tmp_path):
    folder, changes = short
    file = finetuning.config(tmp_path, **changes, **{"mesh.data": "auto"})
    for process in [start(file, devices=2, environment=one) for one in cluster(2)]:
        finish(process)
    close(losses(folder), losses(tmp_path))


def close(left, right) -> None:
    assert [line[:2] for line in left] == [line[:2] for line in right]
    np.testing.assert_allclose([line[2] for line in left], [line[2] for line in right], rtol=1e-5)
