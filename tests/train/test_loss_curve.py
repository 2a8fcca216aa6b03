"""Fifty steps of the training command follow the curve that PyTorch made (`torch_curve.py`)."""

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.train.running import UNSCORED, lines, train

CURVE = Path(__file__).with_name("loss_curve.json")
STEPS, WARM_UP = 50, 5

pytestmark = pytest.mark.usefixtures("quick_compiler")


def config_file(folder: Path) -> Path:
    """The run, each step of which takes several microbatches."""
    return tiny.run_config(
        folder,
        **UNSCORED,
        **{
            "train.total_steps": STEPS,
            "optimizer.warmup_steps": WARM_UP,
            "checkpoint.save_every_steps": STEPS,
        },
    )


def test_fifty_steps_follow_the_curve_of_pytorch(tmp_path):
    train(config_file(tmp_path))
    found = [line["loss"] for line in lines(tmp_path)]
    assert found == pytest.approx(json.loads(CURVE.read_text())["losses"], rel=5e-5)
