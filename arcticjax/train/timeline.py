"""Where the wall time of a run went: goodput.json.

Every moment of an attempt belongs to exactly one part, so the parts add up to the wall time. An
attempt is one start of the command; the time between two attempts is `down`, and steps that an
attempt did and the next one had to do again are `lost`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from arcticjax.train.json_lines import write_atomically

GOODPUT_FILE = "goodput.json"
# Parts of an attempt in the order in which they first come.
PARTS: tuple[str, ...] = (
    "start", "prepare", "restore", "compile", "evaluate", "data", "step", "save", "export"
)  # fmt: skip
# These alternate by the millisecond: the file follows at this distance.
_OFTEN = frozenset({"data", "step"})
_SECONDS_BETWEEN_WRITES = 5.0
_log = logging.getLogger(__name__)


class Timeline:
    """The clock of one attempt; it runs in one part from the moment it is made.

    `changes` grows whenever a part begins or a step is done: proof that the run goes on.
    clock: seconds that only grow. now: the time of day, in UTC.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        self._clock, self._now = clock, now
        self._began, self._since = now(), clock()
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._path: Path | None = None
        self._earlier: list[dict[str, Any]] = []
        self._written = float("-inf")
        self._first = self._last = 0
        self.current = PARTS[0]
        self.changes = 0

    def open(self, directory: Path, first_step: int) -> None:
        """Goes on from the attempts that `directory` knows of, and writes there from now on.

        first_step: steps done already. A file that is none of ours is replaced.
        """
        self._path = directory / GOODPUT_FILE
        self._first = self._last = first_step
        try:
            attempts = json.loads(self._path.read_text(encoding="utf-8"))["attempts"]
            self._earlier = [
                {
                    "began": str(datetime.datetime.fromisoformat(one["began"])),
                    "seconds": float(one["seconds"]),
                    "part": str(one["part"]),
                    "steps": [int(step) for step in one["steps"]],
                    "parts": {part: float(one["parts"][part]) for part in PARTS},
                }
                for one in attempts
            ]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            self._earlier = []
        self._write()

    def enter(self, part: str) -> None:
        """Ends the part under way and begins another."""
        now = self._clock()
        self._parts[self.current] += now - self._since
        rare = {part, self.current} - _OFTEN
        self.current, self._since = part, now
        self.changes += 1
        if rare or now - self._written >= _SECONDS_BETWEEN_WRITES:
            self._write()

    @contextlib.contextmanager
    def part(self, part: str) -> Iterator[None]:
        """A part within another, which then goes on."""
        before = self.current
        self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def step(self, step: int) -> None:
        """Says how many steps of the run are done."""
        self._last = step
        self.changes += 1

    def progress(self) -> tuple[int, str]:
        """For `arcticjax.parallel.watchdog`: what changes as long as the run goes on, and where
        it is."""
        return self.changes, f"{self.current} after step {self._last}"

    def close(self) -> None:
        """Brings the file up to date."""
        self.enter(self.current)
        self._write()

    def summary(self) -> dict[str, Any]:
        """What goodput.json holds: the attempts, and all of the run in `seconds` and `parts`."""
        attempts = [*self._earlier, self._attempt()]
        parts: dict[str, float] = {
            part: sum(one["parts"][part] for one in attempts) for part in PARTS
        }
        lost = sum(map(_lost, attempts, attempts[1:]))
        parts["step"] -= lost
        down = sum(map(_down, attempts, attempts[1:]))
        parts |= {"lost": lost, "down": down}
        seconds = down + sum(one["seconds"] for one in attempts)
        return {
            "seconds": seconds,
            "goodput": parts["step"] / seconds if seconds else 0.0,
            "parts": parts,
            "attempts": attempts,
        }

    def _attempt(self) -> dict[str, Any]:
        parts = dict(self._parts)
        parts[self.current] += self._clock() - self._since
        return {
            "began": str(self._began),
            "seconds": sum(parts.values()),
            "part": self.current,
            "steps": [self._first, self._last],
            "parts": parts,
        }

    def _write(self) -> None:
        if self._path is None:
            return
        self._written = self._clock()
        try:
            content = json.dumps(self.summary(), indent=1) + "\n"
            write_atomically(self._path, content.encode())
        except OSError as error:
            # It is told once, and no reason to stop training.
            _log.warning("%s is not kept up to date: %s", self._path, error.strerror or error)
            self._path = None


def _lost(attempt: dict[str, Any], following: dict[str, Any]) -> float:
    """Seconds of steps that the following attempt did again."""
    first, last = attempt["steps"]
    again = last - max(following["steps"][0], first)
    return attempt["parts"]["step"] * again / (last - first) if again > 0 else 0.0


def _down(attempt: dict[str, Any], following: dict[str, Any]) -> float:
    """Seconds from what an attempt wrote last to the start of the next."""
    began, after = (datetime.datetime.fromisoformat(one["began"]) for one in (attempt, following))
    # A clock that was set back meanwhile must not make it negative.
    return max(0.0, (after - began).total_seconds() - attempt["seconds"])
