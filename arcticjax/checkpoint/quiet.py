"""Keeps the checkpoint library's log lines away from the user while it works."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_detail = logging.getLogger("arcticjax.checkpoint.orbax")
_lock = threading.Lock()
_depth = 0
_undo: Callable[[], None] | None = None


class _OrbaxFilter(logging.Filter):
    """Moves Orbax's records from absl's logger, and asyncio's about its tasks, to ours at DEBUG.

    What it reports as errors it also raises, and the store turns that into one clear message;
    its warnings are about its own options. Of several writes that fail at once asyncio reports all
    but the first.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        origin = record.getMessage() if record.name == "asyncio" else record.pathname
        if "/orbax/" not in origin.replace("\\", "/"):
            return True
        if _detail.isEnabledFor(logging.DEBUG):
            _detail.debug("%s", record.getMessage(), exc_info=record.exc_info)
        return False


@contextmanager
def quiet() -> Iterator[None]:
    """Silences Orbax's log and its dying writers for the duration; may be nested and overlap."""
    global _depth, _undo
    with _lock:
        if _depth == 0:
            _undo = _install()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0 and _undo is not None:
                _undo()
                _undo = None


def _install() -> Callable[[], None]:
    # Not `logging.getLogger("absl")`: made before absl's import, it would not be absl's own class,
    # which is what finds the file that a record comes from.
    from absl import logging as absl_logging

    loggers, noise = (absl_logging.get_absl_logger(), logging.getLogger("asyncio")), _OrbaxFilter()
    for logger in loggers:
        logger.addFilter(noise)
    previous = sys.unraisablehook

    # After one failed write the event loop closes, and each write still under way reports that
    # with a traceback of its own: some thirty for one full disk.
    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            previous(unraisable)

    sys.unraisablehook = hook

    def undo() -> None:
        for logger in loggers:
            logger.removeFilter(noise)
        if sys.unraisablehook is hook:
            sys.unraisablehook = previous

    return undo
