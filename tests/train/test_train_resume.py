"""A run that is killed or told to stop, and started again, is the run that was left alone."""

import random
import signal
import time

import pytest

from tests import tiny
from tests.train.running import BARE, finish, losses, same, start, weights

# Steps take milliseconds: enough of them to be interrupted in the middle.
LONG = {"train.total_steps": 240, "checkpoint.save_every_steps": 40, **BARE}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    finish(start(tiny.run_config(folder, **LONG)))
    return folder


def test_a_killed_run_resumes_bit_for_bit(straight, tmp_path):
    """SIGKILL as soon as some random step is reported; the same command then gives the straight
    run's bits."""
    kill_at = random.randrange(20, 200)
    print("killed at step", kill_at)
    file = tiny.run_config(tmp_path, **LONG)
    process = start(file)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= kill_at:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    # Compiled anew, as on another machine.
    finish(start(file, environment={"JAX_ENABLE_COMPILATION_CACHE": "0"}))
    assert losses(tmp_path) == losses(straight)
    assert same(weights(tmp_path), weights(straight))


def test_a_terminated_run_saves_exits_42_and_resumes_bit_for_bit(straight, tmp_path):
    file = tiny.run_config(tmp_path, **LONG | {"checkpoint.save_every_steps": 1000})
    process = start(file)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 60:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.002)
    output = finish(process, 42)
    assert "asked to stop: saved step" in output.splitlines()[-1]
    finish(start(file))
    assert losses(tmp_path) == losses(straight)
    assert same(weights(tmp_path), weights(straight))
