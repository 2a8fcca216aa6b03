"""Two processes of one run, of which one is told to stop, is killed or hangs."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from launch.local import environments
from tests import tiny
from tests.train.running import ROOT, finish, losses, same, start, weights
from tests.train.test_train_resume import LONG, STEPS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiler")]

TWO = LONG | {"mesh.data": 2, "mesh.peer_seconds": 3, "evaluation.tasks": []}


def both(file, *sets):
    return [start(file, *sets, environment=one) for one in environments(2)]


def wait_for_step(folder, step, processes):
    metrics = folder / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= step):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.002)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    for process in both(tiny.run_config(folder, **TWO)):
        finish(process)
    return folder


@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_saves_the_same_step_in_both(straight, tmp_path, told):
    file = tiny.run_config(tmp_path, **TWO | {"checkpoint.save_every_steps": 1000})
    processes = both(file)
    wait_for_step(tmp_path, 30, processes)
    processes[told].send_signal(signal.SIGTERM)
    saved = {
        re.search(rf"asked to stop: saved step (\d+) of {STEPS}", finish(process, 42))[1]
        for process in processes
    }
    assert len(saved) == 1
    for process in both(file):
        finish(process)
    assert losses(tmp_path) == losses(straight)
    assert same(weights(tmp_path), weights(straight))


def test_sigterm_to_one_before_the_first_step_of_a_resumed_run_stops_both(straight, tmp_path):
    file = tiny.run_config(tmp_path, **TWO)
    processes = both(file)
    wait_for_step(tmp_path, 30, processes)
    processes[0].send_signal(signal.SIGTERM)
    begun = {re.search(r"saved step (\d+) of", finish(one, 42))[1] for one in processes}
    processes = both(file)
    said = ""
    while "compiles" not in said:
        line = processes[0].stdout.readline()
        assert line, said
        said += line
    processes[1].send_signal(signal.SIGTERM)
    ended = [finish(one, 42).splitlines()[-1] for one in processes]
    # At the end of compiling, or where that took less than jax's look at its signals, in a step.
    saved = {re.search(r"asked to stop: .*step (\d+)", one)[1] for one in ended}
    assert len(saved) == len(begun) == 1 and int(*begun) <= int(*saved) < STEPS
    for process in both(file):
        finish(process)
    assert losses(tmp_path) == losses(straight)
    assert same(weights(tmp_path), weights(straight))


def test_the_other_of_a_killed_process_ends_with_141_and_its_stacks(straight, tmp_path):
    file = tiny.run_config(tmp_path, **TWO)
    first, second = processes = both(file)
    wait_for_step(tmp_path, 30, processes)
    second.kill()
    second.communicate()  # its output is closed
    output = finish(first, 141)
    assert "no sign of life from process 1 of 2" in output.splitlines()[-1]
    assert "Thread" in (tmp_path / "run" / "stacks_process_0.txt").read_text()
    for process in both(file):
        finish(process)
    assert losses(tmp_path) == losses(straight)
    assert same(weights(tmp_path), weights(straight))


def test_the_other_of_a_killed_process_0_ends_too(tmp_path):
    """jax's own abort may come first."""
    first, second = processes = both(tiny.run_config(tmp_path, **TWO))
    wait_for_step(tmp_path, 30, processes)
    first.kill()
    first.communicate()
    second.communicate(timeout=120)
    assert second.returncode in (141, -signal.SIGABRT)


def test_a_process_killed_while_it_prepares_ends_the_other(tmp_path):
    """Which would else wait for it for hours."""
    file = tiny.run_config(tmp_path, **TWO)
    one, two = environments(2)
    first = start(file, environment=one)
    code = f"""
        import os, signal
        from arcticjax import errors
        from arcticjax.parallel import command
        from arcticjax.train import __main__, setup

        setup.prepare = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        errors.run_cli(lambda: __main__.main(["--config", {str(file)!r}]), leave=command.leave)
    """
    killed = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], env={**_environment(), **two}
    )
    assert killed.wait(timeout=240) == -signal.SIGKILL
    assert "no sign of life from process 1 of 2" in finish(first, 141).splitlines()[-1]
    assert "Thread" in (tmp_path / "run" / "stacks_process_0.txt").read_text()


def test_a_suspended_process_is_a_lost_one(tmp_path):
    first, second = processes = both(tiny.run_config(tmp_path, **TWO))
    wait_for_step(tmp_path, 30, processes)
    second.send_signal(signal.SIGSTOP)
    try:
        assert "no sign of life from process 1 of 2" in finish(first, 141)
    finally:
        second.kill()
        second.communicate()


def test_a_process_that_hangs_ends_with_142_and_its_stacks_and_the_other_too(tmp_path):
    """Process 1 sleeps in Python before it reports a step; process 0 waits for it in a collective.
    A minute is more than compiling takes."""
    file = tiny.run_config(tmp_path, **TWO | {"mesh.hang_seconds": 60, "mesh.peer_seconds": 600})
    one, two = environments(2)
    code = f"""
        import sys, time
        from arcticjax import errors
        from arcticjax.parallel import command
        from arcticjax.train import __main__, loop

        report = loop.Loop._report

        def sleeps_in_step_40(self, host, *rest):
            if host.step == 40:
                time.sleep(1000)
            return report(self, host, *rest)

        loop.Loop._report = sleeps_in_step_40
        errors.run_cli(lambda: __main__.main(["--config", {str(file)!r}]), leave=command.leave)
    """
    first = start(file, environment=one)
    hanging = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**_environment(), **two},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert "no progress for 60 s" in finish(hanging, 142).splitlines()[-1]
    output, _ = first.communicate(timeout=240)
    # It hangs as long, to a few seconds: which of the two looks first is chance.
    assert first.returncode in (142, 141)
    assert re.search("no progress for 60 s|process 1 with exit code 142", output.splitlines()[-1])
    assert "sleeps_in_step_40" in (tmp_path / "run" / "stacks_process_1.txt").read_text()


def _environment():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    return {**os.environ, "PYTHONPATH": ROOT, "XLA_FLAGS": flags}
