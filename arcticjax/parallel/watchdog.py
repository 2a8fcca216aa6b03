"""A run that hangs ends: with the stacks of all threads, a message and exit code 142."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Self

import jax

from arcticjax.errors import ArcticError, Hung
from arcticjax.parallel import distributed

_POLLS = 20
_LONGEST_POLL_SECONDS = 10.0
# Process 0 runs the service that holds the others together, and with its end jax aborts them: they
# get so long to say for themselves why they stop.
_LAST_SECONDS = 5.0


class Watchdog:
    """While entered, ends the process once `progress` has told the same for `seconds`.

    progress: (a number that changes as long as the run goes on, what the run is doing). None for
    `seconds`: never. directory: where the stacks are written, beside stderr. end: what ends the
    process, for tests.
    """

    def __init__(
        self,
        progress: Callable[[], tuple[int, str]],
        seconds: float | None,
        directory: Path,
        end: Callable[[ArcticError, Path], object] | None = None,
    ) -> None:
        self._progress, self._seconds, self._directory = progress, seconds, directory
        self._end = end or end_now
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._seconds is not None:
            self._thread = threading.Thread(
                target=self._watch, args=(self._seconds,), name="watchdog", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, seconds: float) -> None:
        poll = min(seconds / _POLLS, _LONGEST_POLL_SECONDS)
        # Looks are counted, not time: a process that was suspended has not hung meanwhile.
        last, looks = self._progress()[0], 0
        while not self._stop.wait(poll):
            count, doing = self._progress()
            looks = looks + 1 if count == last else 0
            last = count
            if looks * poll >= seconds:
                message = (
                    f"no progress for {seconds:g} s (mesh.hang_seconds) while in {doing}: the run "
                    f"hangs, or this takes longer than that. The stacks of all threads are above "
                    f"and in {stacks_file(self._directory)}. The same command goes on from the "
                    "newest checkpoint"
                )
                self._end(Hung(message), self._directory)
                return


def end_now(error: ArcticError, directory: Path) -> NoReturn:
    """Writes the stacks of all threads to stderr and into `directory`, then the message, and ends
    the process with the error's exit code, from any thread and whatever the others do."""
    faulthandler.dump_traceback(sys.__stderr__ or 2)
    with contextlib.suppress(OSError):
        # Nothing may have been written there yet.
        directory.mkdir(parents=True, exist_ok=True)
        with stacks_file(directory).open("w") as file:
            file.write(f"{error}\n\n")
            file.flush()
            faulthandler.dump_traceback(file)
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {error}", file=sys.__stderr__, flush=True)
    if distributed.several():
        # In a thread: the service may be what hangs.
        telling = threading.Thread(target=_say_leaving, args=(error.exit_code,), daemon=True)
        telling.start()
        telling.join(_LAST_SECONDS)
        if distributed.rank() == 0:
            time.sleep(_LAST_SECONDS)
    os._exit(error.exit_code)


def _say_leaving(code: int) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.say_leaving(code)


def stacks_file(directory: Path) -> Path:
    """Where this process leaves its stacks."""
    return directory / f"stacks_process_{distributed.rank()}.txt"
