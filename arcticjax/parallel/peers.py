"""Whether the other processes of a run are still there.

A process that died leaves the others in a collective that never ends; jax ends them by an abort
after its own, longer time-out. Here each process shows a sign of life to the service that jax's
processes start by, and looks at those of the others: from host to host, past the devices.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax

from arcticjax.errors import ArcticError, PeerLost
from arcticjax.parallel import distributed, watchdog

_ROOT = "arcticjax/alive"
_POLLS = 10
_LONGEST_POLL_SECONDS = 5.0
# What another process has to end by itself once one has said that it leaves.
_LEAVING_SECONDS = 2.0
_log = logging.getLogger(__name__)


class Peers:
    """While entered, ends this process with PeerLost once another has shown no sign of life for
    `seconds`, or has left with an error; one process alone does nothing.

    All processes must enter at about the same time, and leave once all are done. An error that jax
    raises inside may be what a lost peer looks like first: leaving then waits for certainty.
    directory: where the stacks of all threads are written. end: what ends the process, for tests.
    """

    def __init__(
        self,
        seconds: float,
        directory: Path,
        end: Callable[[ArcticError, Path], object] | None = None,
    ) -> None:
        self._seconds, self._directory = seconds, directory
        self._end = end or watchdog.end_now
        self._stop, self._ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._poll = min(seconds / _POLLS, _LONGEST_POLL_SECONDS)

    def __enter__(self) -> Self:
        if jax.process_count() > 1:
            client = distributed.coordination_service()
            self._thread = threading.Thread(
                target=self._watch, args=(client,), name="peers", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if self._thread is None:
            return
        if kind is not None and issubclass(kind, jax.errors.JaxRuntimeError):
            if "RESOURCE_EXHAUSTED" not in str(error):
                _log.error("the devices report: %s", str(error).strip().splitlines()[0][:300])
                self._ended.wait(2 * self._seconds)
        self._stop.set()
        self._thread.join()

    def _watch(self, client: Any) -> None:
        mine, count = jax.process_index(), jax.process_count()
        # Looks are counted, not time: a process that was suspended missed nothing.
        seen: dict[int, tuple[str, int]] = {}
        beat = failures = 0
        while not self._stop.wait(self._poll):
            beat += 1
            try:
                client.key_value_set(f"{_ROOT}/{mine}", str(beat), allow_overwrite=True)
                signs = distributed.by_process(client, _ROOT)
                left = distributed.by_process(client, distributed.LEAVING)
                failures = 0
            except jax.errors.JaxRuntimeError as problem:
                failures += 1
                if failures * self._poll >= self._seconds:
                    return self._lose(f"process 0 does not answer ({_first_line(problem)})")
                continue
            if left:
                if self._stop.wait(_LEAVING_SECONDS):
                    return None
                codes = ", ".join(f"process {one} with exit code {left[one]}" for one in left)
                return self._lose(f"another process has left: {codes}; its output says why")
            silent = []
            for process in range(count):
                sign, looks = seen.get(process, ("", 0))
                now = signs.get(process, "")
                seen[process] = (now, looks + 1 if now == sign else 0)
                if process != mine and seen[process][1] * self._poll >= self._seconds:
                    silent.append(process)
            if silent:
                names = ", ".join(map(str, silent))
                return self._lose(
                    f"no sign of life from process {names} of {count} for {self._seconds:g} s "
                    "(mesh.peer_seconds)"
                )
        return None

    def _lose(self, what: str) -> None:
        self._ended.set()
        message = (
            f"{what}. The stacks of this process are in {watchdog.stacks_file(self._directory)}. "
            "The same command, given to all processes, goes on from the newest checkpoint"
        )
        self._end(PeerLost(message), self._directory)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
