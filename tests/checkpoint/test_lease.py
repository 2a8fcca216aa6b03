"""One writer per run directory: claims, heartbeats, take-over and release."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from arcticjax.checkpoint import RunDirectory
from arcticjax.checkpoint import lease as module
from arcticjax.checkpoint.lock_file import LockFile
from arcticjax.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("error")
ROOT = Path(__file__).resolve().parents[2]

HOLDER = """
    import sys, types
    # The package would import jax, which takes longer than the rest of a test.
    package = sys.modules["arcticjax.checkpoint"] = types.ModuleType("arcticjax.checkpoint")
    package.__path__ = ["arcticjax/checkpoint"]
    from arcticjax.checkpoint.run_directory import RunDirectory
    lease = RunDirectory(sys.argv[1]).claim(heartbeat_seconds=0.1)
    print("held", flush=True)
    sys.stdin.readline()
    if len(sys.argv) > 2:
        raise RuntimeError("the run failed")
"""


@pytest.fixture
def holder(tmp_path):
    """Starts another process that holds the directory until its standard input ends."""
    started = []

    def start(*arguments):
        command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path), *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def lock_of(tmp_path):
    return json.loads((tmp_path / "run.lock").read_text())


def write_lock(tmp_path, age=0.0, **changes):
    """A lock file that another run left `age` seconds ago."""
    content = {**dataclasses.asdict(module._myself()), "token": "other", **changes}
    path = tmp_path / "run.lock"
    path.write_text(json.dumps(content))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_second_of_two_live_runs_is_refused_with_the_owner_named(tmp_path, holder):
    process = holder()
    owner = lock_of(tmp_path)
    assert owner["pid"] == process.pid
    with pytest.raises(ConfigError, match=rf"process {process.pid} on host {owner['host']}"):
        RunDirectory(tmp_path).claim()
    assert lock_of(tmp_path) == owner


@pytest.mark.parametrize("arguments", [[], ["fail"]])
def test_the_lease_is_released_at_a_normal_end_and_at_an_exception(tmp_path, holder, arguments):
    process = holder(*arguments)
    process.communicate("\n", timeout=30)
    assert process.returncode == len(arguments)
    assert not (tmp_path / "run.lock").exists()


def test_the_lease_of_a_killed_run_is_taken_over_with_a_warning(tmp_path, holder, caplog):
    process = holder()
    process.send_signal(signal.SIGKILL)
    # Not waited for: a zombie has ended as well.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with caplog.at_level(logging.WARNING, "arcticjax"), RunDirectory(tmp_path).claim():
        assert lock_of(tmp_path)["pid"] == os.getpid()
    assert f"process {process.pid}" in caplog.text and "taking over" in caplog.text


def test_one_process_cannot_hold_a_directory_twice(tmp_path):
    with RunDirectory(tmp_path).claim():
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
            RunDirectory(tmp_path).claim()
        assert (tmp_path / "run.lock").exists()
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "metrics.jsonl", "report"]


def test_a_reused_process_id_is_not_the_owner(tmp_path, caplog):
    """Containers restart with the same small ids: this process has the id of the dead owner."""
    write_lock(tmp_path, process_start=1)
    with RunDirectory(tmp_path).claim():
        assert lock_of(tmp_path)["token"] != "other"
    assert "taking over" in caplog.text


def test_an_owner_elsewhere_with_an_old_heartbeat_is_taken_over(tmp_path, caplog):
    write_lock(tmp_path, age=130, machine="elsewhere", host="far")
    before = time.monotonic()
    RunDirectory(tmp_path).claim().release()
    assert time.monotonic() - before < 5
    assert "on host far" in caplog.text and "last heartbeat 13" in caplog.text


def test_an_owner_elsewhere_whose_heartbeat_moves_is_respected(tmp_path):
    path = write_lock(tmp_path, age=1, machine="elsewhere", host="far", pid=77)
    stop = threading.Event()

    def beat():
        while not stop.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="process 77 on host far"):
            RunDirectory(tmp_path).claim()
    finally:
        stop.set()
        thread.join()


def test_an_owner_elsewhere_that_shows_no_life_is_waited_for_then_taken_over(tmp_path, caplog):
    write_lock(tmp_path, age=0, machine="elsewhere", host="far")
    before = time.monotonic()
    RunDirectory(tmp_path).claim(stale_seconds=1.0).release()
    assert 0.8 < time.monotonic() - before < 10
    assert "waiting up to" in caplog.text and "taking over" in caplog.text


def test_the_heartbeat_moves_and_a_damaged_lock_belongs_to_nobody(tmp_path):
    (tmp_path / "run.lock").write_text('{"host": "cut of')
    with RunDirectory(tmp_path).claim(heartbeat_seconds=0.05) as lease:
        first = (tmp_path / "run.lock").stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while (tmp_path / "run.lock").stat().st_mtime_ns == first:
            assert time.monotonic() < deadline, "no heartbeat"
            time.sleep(0.02)
        lease.check()


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_a_lost_lease_is_noticed_and_the_new_owner_s_lock_is_left_alone(tmp_path, how):
    lease = RunDirectory(tmp_path).claim(heartbeat_seconds=0.05)
    if how == "replaced":
        write_lock(tmp_path, host="far")
    else:
        (tmp_path / "run.lock").unlink()
    deadline = time.monotonic() + 10
    while not lease.lost:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(ConfigError, match="taken over by another run"):
        lease.check()
    lease.release()
    assert (tmp_path / "run.lock").exists() == (how == "replaced")


def test_of_many_claims_at_once_on_a_stale_lock_exactly_one_wins(tmp_path):
    for _ in range(5):
        write_lock(tmp_path, process_start=1)
        start, won, lost = threading.Barrier(8), [], []

        def attempt(start=start, won=won, lost=lost):
            start.wait()
            try:
                won.append(module.claim(LockFile(tmp_path / "run.lock")))
            except ConfigError:
                lost.append(1)

        threads = [threading.Thread(target=attempt) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 7)
        won[0].release()


def test_a_forked_child_does_not_release_its_parent_s_lease(tmp_path):
    with RunDirectory(tmp_path).claim() as lease:
        child = dataclasses.replace(lease.owner, pid=lease.owner.pid + 1)
        own, lease.owner = lease.owner, child
        lease.release()
        lease.owner = own
        assert (tmp_path / "run.lock").exists()
