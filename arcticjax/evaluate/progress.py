"""How far an evaluation is, and how long it will take."""

from __future__ import annotations

import datetime
import math
import sys
import time
from collections.abc import Callable
from typing import TextIO

from arcticjax.step.embedder import Embedder

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_REFRESHES = 0.5
# English prose of the usual mix of words, to measure with.
_PROSE = (
    "The river that runs through the old town was once used to carry timber and stone to the "
    "harbour, where small ships waited for the tide; today its banks are a public garden, and "
    "researchers measure how temperature and rainfall change the plants that grow there. "
)


def measure(embedder: Embedder, clock: Callable[[], float] = time.monotonic) -> float:
    """Characters of prose that the embedder encodes in a second; compiles its program first."""
    shapes = embedder.shapes()
    # Less than half of a row each: two texts share it.
    length = 2 * shapes["row_length"]
    text = (_PROSE * (length // len(_PROSE) + 1))[:length]
    embedder.encode([text])
    texts = [text] * (4 * shapes["devices"] * shapes["rows"])
    began = clock()
    embedder.encode(texts)
    return len(text) * len(texts) / max(clock() - began, 1e-6)


class Progress:
    """Tells which task is in work and what is left; silent unless `talk`.

    works: task -> characters to encode, as far as known. rate: characters a second, measured; with
    the first finished work, what was really reached takes its place.
    """

    def __init__(
        self,
        works: dict[str, float | None],
        rate: float,
        *,
        talk: bool,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._works = works
        self._rate = rate
        self._talk = talk
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._clock = clock
        self._began = self._last = clock()
        self._done = 0.0
        self._task, self._texts, self._encoded = "", 0, 0

    def left(self) -> float | None:
        """Seconds to go; None if a task's size is not known."""
        if any(work is None for work in self._works.values()):
            return None
        total = sum(work or 0.0 for work in self._works.values())
        done = self._done + self._current()
        elapsed = self._clock() - self._began
        rate = done / elapsed if self._reached() else self._rate
        return (total - done) / rate

    def estimate(self) -> str:
        """What is left, in words: until something was reached, of encoding alone, since loading,
        compiling and searching cannot be measured ahead."""
        left = self.left()
        if left is None:
            return "an unknown time"
        return f"about {seconds(math.ceil(left))}" + ("" if self._reached() else " of encoding")

    def begin(self, task: str, texts: int | None) -> None:
        """A task is begun; `texts` are to be encoded, None if not known."""
        self._task, self._texts, self._encoded = task, texts or 0, 0
        self.say(f"{task}: begun, {self.estimate()} left in all")

    def encoded(self, texts: int) -> None:
        """So many texts more are encoded."""
        self._encoded += texts
        now = self._clock()
        between = SECONDS_BETWEEN_REFRESHES if self._terminal else SECONDS_BETWEEN_LINES
        if not self._talk or now - self._last < between:
            return
        self._last = now
        of = f" of {self._texts:,}" if self._texts else ""
        line = f"{self._task}: {self._encoded:,}{of} texts, {self.estimate()} left"
        if self._terminal:
            self._stream.write(f"\r\x1b[K{line}")
            self._stream.flush()
        else:
            self.say(line)

    def finish(self, line: str) -> None:
        """The task is done."""
        self._done += self._works.get(self._task) or 0.0
        self._texts = self._encoded = 0
        self.say(f"{self._task}: {line}")

    def say(self, line: str) -> None:
        """Writes a line of its own."""
        if self._talk:
            clear = "\r\x1b[K" if self._terminal else ""
            print(f"{clear}{line}", file=self._stream, flush=True)

    def _reached(self) -> bool:
        """Whether so much is done that its time, all that goes with encoding included, tells of the
        rest."""
        total = sum(work or 0.0 for work in self._works.values())
        done = self._done + self._current()
        return done > 0.02 * total and self._clock() - self._began > 1

    def _current(self) -> float:
        if not self._texts:
            return 0.0
        return (self._works.get(self._task) or 0.0) * min(1.0, self._encoded / self._texts)


def seconds(value: float) -> str:
    """A duration as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(value)))
