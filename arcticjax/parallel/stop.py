"""SIGTERM and Ctrl-C over a whole run: what holds the run directory lets go of it, and the user
learns what is saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from jax.experimental import multihost_utils

from arcticjax import errors
from arcticjax.parallel import distributed


class StopSignal:
    """While entered, SIGTERM ends the run with Preempted: at once, or inside `held` when the run
    says so. Further ones change nothing: schedulers send several.

    saved: says what the run has saved, and what the same command would do; asked only once all
    that the run had open is closed. Ctrl-C stays a KeyboardInterrupt, and carries that too.
    Of several processes jax's own notifier has the signal, from when they have joined; they stop
    together, where all of them `look` or after the same step.
    """

    def __init__(self, saved: Callable[[], str]) -> None:
        self._saved = saved
        self._asked = False
        self._holding = False
        self._installed = False
        self._looks = 0
        self._before: Any = None

    def __enter__(self) -> Self:
        # Python has signals for the main thread only; a run in another one is its caller's to stop.
        alone = distributed.detect(os.environ) is None
        if alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
            self._installed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if isinstance(error, _Stop):
                raise errors.Preempted(f"asked to stop: {self._saved()}") from None
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(self._saved()) from None
        finally:
            if self._installed:
                signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def look(self) -> None:
        """Stops the run if it is one of several processes and any was asked to stop; all must look
        at the same places. One alone is stopped at once, wherever it is."""
        if distributed.several():
            self._agreed()
            self._stop_if_asked()

    @contextmanager
    def held(self) -> Iterator[Callable[[], bool]]:
        """Whether the run was asked to stop, to be asked after every step, by all processes. Where
        nobody asked, the run stops at the end of the block."""
        self._holding = True
        try:
            self._stop_if_asked()
            yield lambda: self._agreed() if distributed.several() else self._asked
        finally:
            self._holding = False
        self._stop_if_asked()

    def _agreed(self) -> bool:
        # jax says yes at one count only, that after the highest so far. Steps would not do: a
        # resumed run begins past the count that was agreed on while it compiled.
        self._looks += 1
        self._asked |= multihost_utils.reached_preemption_sync_point(self._looks)
        return self._asked

    def _note(self, *_: object) -> None:
        first, self._asked = not self._asked, True
        # A second signal must not break off what the first one made the run close.
        if first and not self._holding:
            raise _Stop

    def _stop_if_asked(self) -> None:
        if self._asked:
            # One that leaves while another is on its way here would be a lost peer to it.
            if distributed.several():
                multihost_utils.sync_global_devices("arcticjax asked to stop")
            raise _Stop


class _Stop(BaseException):
    """Leaves the run, like Ctrl-C; no Exception, so that nobody takes it for a fault of his own."""
