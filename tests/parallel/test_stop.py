"""SIGTERM and Ctrl-C: outside the training loop at once, inside when the loop says so."""

import signal
import threading

import pytest

from arcticjax import errors
from arcticjax.parallel.stop import StopSignal


def terminate():
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture(autouse=True)
def handler():
    """What a run must put back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before


def test_at_once_and_a_second_signal_does_not_disturb_what_is_closed():
    closed = []
    with pytest.raises(errors.Preempted, match=r"^asked to stop: nothing yet, closed$"):
        with StopSignal(lambda: f"nothing yet, {closed[0]}"):
            try:
                try:
                    terminate()
                except Exception:
                    pytest.fail("taken for an error")
                pytest.fail("went on")
            finally:
                terminate()
                closed.append("closed")


def test_held_it_is_only_noted_and_stops_at_the_end():
    steps = []
    with pytest.raises(errors.Preempted, match=r"^asked to stop: step 2$"):
        with StopSignal(lambda: f"step {len(steps)}") as stop:
            with stop.held() as stopped:
                assert not stopped(0)
                for step in (1, 2):
                    terminate()
                    steps.append(step)
                    assert stopped(step)
            pytest.fail("went on")


def test_the_loop_s_own_message_stands():
    with pytest.raises(errors.Preempted, match=r"^saved step 3$"):
        with StopSignal(lambda: "another") as stop, stop.held() as stopped:
            terminate()
            assert stopped(3)
            raise errors.Preempted("saved step 3")


def test_without_a_signal_nothing_happens():
    with StopSignal(lambda: pytest.fail("not asked")) as stop, stop.held() as stopped:
        assert not stopped(1)


def test_an_interrupt_carries_what_is_saved():
    with pytest.raises(KeyboardInterrupt, match=r"^step 7$"), StopSignal(lambda: "step 7"):
        raise KeyboardInterrupt


def test_several_processes_are_left_to_jax(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    for name, value in (("COORDINATOR", "localhost:1"), ("PROCESSES", "2"), ("PROCESS", "0")):
        monkeypatch.setenv(f"ARCTICJAX_{name}", value)
    with StopSignal(lambda: ""):
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_in_a_thread_has_no_signals():
    done = []

    def work():
        with StopSignal(lambda: "") as stop, stop.held() as stopped:
            done.append(stopped(1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [False]
