"""A run that hangs, or loses a process, ends with the stacks of all threads and its own code."""

import itertools
import subprocess
import sys
import textwrap
import threading
import time

import jax
import pytest

from arcticjax import errors
from arcticjax.parallel import distributed
from arcticjax.parallel.peers import Peers
from arcticjax.parallel.watchdog import Watchdog

SOON = 0.2  # seconds


class Ended:
    """In place of the end of the process."""

    def __init__(self):
        self.error = None
        self.called = threading.Event()

    def __call__(self, error, directory):
        self.error = error
        self.called.set()


def test_a_run_without_progress_is_ended(tmp_path):
    ended = Ended()
    with Watchdog(lambda: (7, "evaluate after step 3"), SOON, tmp_path, ended):
        assert ended.called.wait(60)
    assert isinstance(ended.error, errors.Hung)
    assert "no progress for 0.2 s (mesh.hang_seconds) while in evaluate after step 3" in str(
        ended.error
    )


def test_progress_however_slow_keeps_it_running(tmp_path):
    ended, count, looked = Ended(), itertools.count(), threading.Event()

    def progress():
        now = next(count)
        if now > 100:  # five times the looks after which it would have been ended
            looked.set()
        return now // 15, "step"

    with Watchdog(progress, SOON, tmp_path, ended):
        assert looked.wait(60)
    assert not ended.called.is_set()


def test_switched_off_it_never_looks(tmp_path):
    with Watchdog(lambda: pytest.fail("looked"), None, tmp_path):
        assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_the_process_ends_with_142_and_the_stacks_of_all_threads(tmp_path):
    """The main thread sleeps in a function of its own, another too."""
    code = f"""
        import threading, time
        from pathlib import Path
        from arcticjax.parallel.watchdog import Watchdog

        def waits_for_ever():
            time.sleep(1000)

        def another_thread():
            time.sleep(1000)

        threading.Thread(target=another_thread, daemon=True).start()
        with Watchdog(lambda: (0, "step"), {SOON}, Path({str(tmp_path)!r})):
            waits_for_ever()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == errors.Hung.exit_code == 142
    stacks = (tmp_path / "stacks_process_0.txt").read_text()
    for text in (stacks, done.stderr):
        assert "waits_for_ever" in text and "another_thread" in text
    assert done.stderr.splitlines()[-1].startswith("error: no progress for 0.2 s")


class Service:
    """The store of keys and values by which processes find each other, without the others."""

    def __init__(self):
        self.keys = {}
        self.broken = False

    def key_value_set(self, key, value, allow_overwrite=False):
        if self.broken:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect\nmore")
        self.keys[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.keys.items() if key.startswith(folder)]


@pytest.fixture
def service(monkeypatch):
    made = Service()
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(distributed, "coordination_service", lambda: made)
    return made


def others_live(service, stop, which=(1, 2)):
    for beat in itertools.count():
        for process in which:
            service.keys[f"arcticjax/alive/{process}"] = str(beat)
        if stop.wait(0.005):
            return


@pytest.fixture
def living(service):
    """Starts signs of life of other processes; they end with the test."""
    stop, threads = threading.Event(), []

    def begin(*which):
        threads.append(threading.Thread(target=others_live, args=(service, stop, which)))
        threads[-1].start()

    yield begin
    stop.set()
    for thread in threads:
        thread.join()


def test_a_silent_process_is_named(service, living, tmp_path):
    ended = Ended()
    living(1)
    with Peers(SOON, tmp_path, ended):
        assert ended.called.wait(60)
    assert isinstance(ended.error, errors.PeerLost)
    assert "no sign of life from process 2 of 3 for 0.2 s (mesh.peer_seconds)" in str(ended.error)


def test_processes_that_live_are_left_alone(service, living, tmp_path):
    ended = Ended()
    living(1, 2)
    with Peers(SOON, tmp_path, ended):
        while int(service.keys.get("arcticjax/alive/0", 0)) < 30:  # three times peer_seconds
            time.sleep(0.01)
    assert not ended.called.is_set()


def test_a_process_that_left_with_an_error_is_named_with_its_code(
    service, living, tmp_path, monkeypatch
):
    monkeypatch.setattr("arcticjax.parallel.peers._LEAVING_SECONDS", 0.01)
    ended = Ended()
    living(1, 2)
    service.keys[f"{distributed.LEAVING}/2"] = "3"
    with Peers(2, tmp_path, ended):
        assert ended.called.wait(60)
    assert "process 2 with exit code 3" in str(ended.error)


def test_a_service_that_is_gone_is_process_0_lost(service, tmp_path):
    service.broken = True
    ended = Ended()
    with Peers(SOON, tmp_path, ended):
        assert ended.called.wait(60)
    assert "process 0 does not answer (UNAVAILABLE: failed to connect)" in str(ended.error)


def test_an_error_of_the_devices_waits_for_certainty(service, living, tmp_path):
    """What a broken connection looks like from Python, before anybody can tell why."""
    ended = Ended()
    living(1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Connection reset"):
        with Peers(SOON, tmp_path, ended):
            raise jax.errors.JaxRuntimeError("INTERNAL: Connection reset by peer")
    assert ended.called.is_set()


def test_one_process_alone_looks_at_nobody(tmp_path):
    with Peers(SOON, tmp_path):
        assert "peers" not in [thread.name for thread in threading.enumerate()]
