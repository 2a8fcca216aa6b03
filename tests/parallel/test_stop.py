"""SIGTERM and Ctrl-C: outside the training loop at once, inside when the loop says so."""

import signal
import threading

import pytest

from arcticjax import errors
from arcticjax.parallel import distributed
from arcticjax.parallel.stop import StopSignal

AGREEMENT = "arcticjax.parallel.stop.multihost_utils.reached_preemption_sync_point"
BARRIER = "arcticjax.parallel.stop.multihost_utils.sync_global_devices"


def terminate():
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture(autouse=True)
def handler():
    """What a run must put back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before


def test_at_once_and_further_signals_do_not_disturb_what_is_closed():
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
                terminate()
                closed.append("closed")


def test_held_it_is_only_noted_and_stops_at_the_end():
    steps = []
    with pytest.raises(errors.Preempted, match=r"^asked to stop: step 2$"):
        with StopSignal(lambda: f"step {len(steps)}") as stop:
            with stop.held() as stopped:
                assert not stopped()
                for step in (1, 2):
                    terminate()
                    steps.append(step)
                    assert stopped()
            pytest.fail("went on")


def test_the_loop_s_own_message_stands():
    with pytest.raises(errors.Preempted, match=r"^saved step 3$"):
        with StopSignal(lambda: "another") as stop, stop.held() as stopped:
            terminate()
            assert stopped()
            raise errors.Preempted("saved step 3")


def test_without_a_signal_nothing_happens():
    with StopSignal(lambda: pytest.fail("not asked")) as stop, stop.held() as stopped:
        assert not stopped()


def test_an_interrupt_carries_what_is_saved():
    with pytest.raises(KeyboardInterrupt, match=r"^step 7$"), StopSignal(lambda: "step 7"):
        raise KeyboardInterrupt


@pytest.fixture
def several(monkeypatch):
    """As one of several processes; gives the counts at which jax was asked, of which it stops at
    the fourth."""
    counts = []

    def reached(count):
        counts.append(count)
        return count == 4

    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(AGREEMENT, reached)
    monkeypatch.setattr(BARRIER, lambda name: counts.append("all are here"))
    return counts


def test_several_processes_stop_after_the_same_step(several):
    """jax agrees on a count, whatever the step is that a run goes on from."""
    with pytest.raises(errors.Preempted, match=r"^saved step 22$"):
        with StopSignal(lambda: "another") as stop:
            stop.look()
            stop.look()
            with stop.held() as stopped:
                assert [stopped(), stopped()] == [False, True]
                assert several == [1, 2, 3, 4]
                raise errors.Preempted("saved step 22")


def test_several_processes_stop_at_the_same_place(several):
    with pytest.raises(errors.Preempted, match=r"^asked to stop: all are here$"):
        with StopSignal(lambda: several[-1]) as stop:
            with stop.held() as stopped:
                assert not any(stopped() for _ in range(3))
            stop.look()
            pytest.fail("went on")


def test_several_that_agree_after_the_last_step_stop_at_its_end(several):
    with pytest.raises(errors.Preempted, match=r"^asked to stop: all steps$"):
        with StopSignal(lambda: "all steps") as stop:
            with stop.held() as stopped:
                assert [stopped() for _ in range(5)] == [False, False, False, True, True]
            pytest.fail("went on")


def test_one_process_does_not_ask_jax(monkeypatch):
    monkeypatch.setattr(AGREEMENT, pytest.fail)
    with StopSignal(lambda: "") as stop:
        stop.look()


def test_the_signal_of_several_processes_is_left_to_jax(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    for name, value in (("COORDINATOR", "localhost:1"), ("PROCESSES", "2"), ("PROCESS", "0")):
        monkeypatch.setenv(f"ARCTICJAX_{name}", value)
    with StopSignal(lambda: ""):
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_in_a_thread_has_no_signals():
    done = []

    def work():
        with StopSignal(lambda: "") as stop, stop.held() as stopped:
            done.append(stopped())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [False]
