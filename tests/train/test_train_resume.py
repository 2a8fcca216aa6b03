"""A run that is killed or told to stop, and started again, is the run that was left alone."""

import random
import re
import signal
import time

import pytest

from tests import tiny
from tests.train.running import BARE, finish, losses, same, start, weights

pytestmark = pytest.mark.usefixtures("quick_compiler")

# Steps take milliseconds: enough of them to be interrupted in the middle.
LONG = {"train.total_steps": 120, "checkpoint.save_every_steps": 20, **BARE}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    finish(start(tiny.run_config(folder, **LONG)))
    return folder


def begun_at(output: str) -> int:
    """The step that a run says it begins after."""
    return int(re.search(r"steps +(\d+) of 120 done", output)[1])


def test_a_killed_run_resumes_bit_for_bit(straight, tmp_path):
    """SIGKILL as soon as some random step is reported; the same command then gives the straight
    run's bits."""
    kill_at = random.randrange(10, 100)
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
    output = finish(start(file, environment={"JAX_ENABLE_COMPILATION_CACHE": "0"}))
    if kill_at > 60:  # the save of step 20 has long been done
        assert begun_at(output) >= 20
    assert losses(tmp_path) == losses(straight)
    assert same(weights(tmp_path), weights(straight))


def test_a_terminated_run_saves_exits_42_and_resumes_bit_for_bit(straight, tmp_path):
    file = tiny.run_config(tmp_path, **LONG | {"checkpoint.save_every_steps": 1000})
    process = start(file)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 30:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.002)
    output = finish(process, 42)
    saved = re.search(r"asked to stop: saved step (\d+) of 120", output.splitlines()[-1])
    assert saved and 30 <= int(saved[1]) < 120
    assert begun_at(finish(start(file))) == int(saved[1])
    assert losses(tmp_path) == losses(straight)
    assert same(weights(tmp_path), weights(straight))


def test_a_run_terminated_before_its_first_step_exits_42_and_begins_anew(tmp_path):
    file = tiny.run_config(tmp_path, **{"train.total_steps": 3}, **BARE)
    process = start(file)
    said = ""
    while "compiles" not in said:  # before the first step there is compiling and an evaluation
        line = process.stdout.readline()
        assert line, said
        said += line
    process.send_signal(signal.SIGTERM)
    output = finish(process, 42)
    assert output.splitlines()[-1] == (
        f"error: asked to stop: {tmp_path / 'run'} holds no checkpoint yet; the same command "
        "begins at step 0"
    )
    assert not (tmp_path / "run" / "run.lock").exists()
    finish(start(file))
