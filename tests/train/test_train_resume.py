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
STEPS = 200
LONG = {
    "train.total_steps": STEPS, "checkpoint.save_every_steps": 20, "evaluation.tasks": [], **BARE
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    finish(start(tiny.run_config(folder, **LONG)))
    return folder


def begun_at(output: str) -> int:
    """The step that a run says it begins after."""
    return int(re.search(rf"steps +(\d+) of {STEPS} done", output)[1])


def send(sign, process, folder, step):
    """Sends a signal as soon as a step is reported."""
    metrics = folder / "run" / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= step:
            process.send_signal(sign)
            break
        time.sleep(0.002)


def test_a_run_stopped_in_every_way_resumes_bit_for_bit(straight, tmp_path):
    """Told to stop before its first step and then in the middle, killed at some random step; the
    same command each time, and the last one compiles anew, as on another machine."""
    file = tiny.run_config(tmp_path, **LONG)
    process = start(file)
    said = ""
    while "compiles" not in said:  # before the first step
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

    process = start(file)
    send(signal.SIGTERM, process, tmp_path, 10)
    output = finish(process, 42)
    assert begun_at(output) == 0
    saved = re.search(rf"asked to stop: saved step (\d+) of {STEPS}", output.splitlines()[-1])
    assert saved and 10 <= int(saved[1]) < 150

    kill_at = random.randrange(int(saved[1]) + 1, 170)
    print("killed at step", kill_at)
    process = start(file)
    send(signal.SIGKILL, process, tmp_path, kill_at)
    output = finish(process, -signal.SIGKILL)
    assert begun_at(output) == int(saved[1])

    output = finish(start(file, environment={"JAX_ENABLE_COMPILATION_CACHE": "0"}))
    assert begun_at(output) >= int(saved[1])
    assert losses(tmp_path) == losses(straight)
    assert same(weights(tmp_path), weights(straight))
