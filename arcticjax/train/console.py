"""A run's progress on the console: a live bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import contextlib
import datetime
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, Protocol, TextIO

import rich.console
import rich.live
from rich.console import Group
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_REFRESHES = 0.1


class Console(Protocol):
    """What a report needs of a console. No method raises because the console went away."""

    def progress(self, record: Mapping[str, Any], seconds_left: float | None) -> None:
        """Shows one logged step, with the fields of metrics.jsonl."""
        ...

    def say(self, text: str) -> None:
        """Shows text as it is, on lines of its own."""
        ...

    def close(self) -> None:
        """Shows the last step if it is not shown yet, and leaves the terminal clean."""
        ...


def open_console(
    stream: TextIO | None, total_steps: int, start_step: int, clock: Callable[[], float]
) -> Console:
    """Opens a bar if the stream (default stderr) is a terminal, plain lines otherwise."""
    shown = sys.stderr if stream is None else stream
    if _is_terminal(shown):
        console = rich.console.Console(file=shown)
        if console.is_terminal and not console.is_dumb_terminal:
            return LiveBar(console, total_steps, start_step, clock)
    return PlainLines(shown, total_steps, clock)


class PlainLines:
    """One line for the first step, the last, and at most every 5 seconds in between."""

    def __init__(self, stream: TextIO, total_steps: int, clock: Callable[[], float]) -> None:
        """clock: seconds."""
        self._stream = stream
        self._total_steps = total_steps
        self._clock = clock
        self._last_time: float | None = None
        self._waiting: str | None = None

    def progress(self, record: Mapping[str, Any], seconds_left: float | None) -> None:
        """Writes the step's line, or holds it until `close` if the last one is fresh."""
        step = int(record["step"])
        text = f"step {step}/{self._total_steps}  {describe(record)}"
        text += f"  left {describe_seconds(seconds_left)}"
        now = self._clock()
        fresh = self._last_time is not None and now - self._last_time < SECONDS_BETWEEN_LINES
        if fresh and step != self._total_steps:
            self._waiting = text
            return
        self._last_time = now
        self._waiting = None
        self.say(text)

    def say(self, text: str) -> None:
        """Writes text and a line break."""
        with _unless_gone(self._stream):
            self._stream.write(_printable(text, self._stream) + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Writes the last step's line if it was held back."""
        if self._waiting is not None:
            self.say(self._waiting)
            self._waiting = None


class LiveBar:
    """A bar with step and time left, and below it loss, rates, fill and data wait."""

    def __init__(
        self,
        console: rich.console.Console,
        total_steps: int,
        start_step: int,
        clock: Callable[[], float],
    ) -> None:
        """clock: seconds."""
        self._console = console
        self._total_steps = total_steps
        self._clock = clock
        self._last_refresh: float | None = None
        self._numbers = "starting"
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("left {task.fields[left]}", markup=False),
            expand=True,
        )
        self._task = self._bar.add_task(
            f"step {start_step}/{total_steps}", total=total_steps, completed=start_step, left="?"
        )
        self._live = rich.live.Live(
            get_renderable=lambda: Group(self._bar.get_renderable(), Text(self._numbers)),
            console=console,
            auto_refresh=False,  # no thread beside the step; every logged step draws anyway
            # What is printed elsewhere must not be drawn into: only streams on the terminal join.
            redirect_stdout=_is_terminal(sys.stdout),
            redirect_stderr=_is_terminal(sys.stderr),
        )
        with _unless_gone(console.file):
            self._live.start(refresh=True)

    def progress(self, record: Mapping[str, Any], seconds_left: float | None) -> None:
        """Draws the step, at most ten times a second."""
        step = int(record["step"])
        self._numbers = _printable(describe(record), self._console.file)
        self._bar.update(
            self._task,
            description=f"step {step}/{self._total_steps}",
            completed=step,
            left=describe_seconds(seconds_left),
        )
        now = self._clock()
        due = self._last_refresh is None or now - self._last_refresh >= SECONDS_BETWEEN_REFRESHES
        if due or step >= self._total_steps:
            self._last_refresh = now
            with _unless_gone(self._console.file):
                self._live.refresh()

    def say(self, text: str) -> None:
        """Writes text above the bar."""
        text = _printable(text, self._console.file)
        with _unless_gone(self._console.file):
            self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        """Draws the bar a last time and gives the terminal back."""
        with _unless_gone(self._console.file):
            self._live.stop()


def describe(record: Mapping[str, Any]) -> str:
    """Puts a logged step's numbers on one line; fields that are missing are left out."""
    parts = [
        f"{before}{style(record[name])}{after}"
        for name, before, style, after in (
            ("loss", "loss ", lambda x: f"{x:.4f}", ""),
            ("accuracy", "accuracy ", lambda x: f"{100 * x:.1f}", " %"),
            ("pairs_per_second", "", _compact, " pairs/s"),
            ("tokens_per_second", "", _compact, " tokens/s"),
            ("fill", "fill ", lambda x: f"{100 * x:.1f}", " %"),
            ("data_wait_fraction", "data wait ", lambda x: f"{100 * x:.1f}", " %"),
        )
        if record.get(name) is not None
    ]
    if record.get("source"):
        parts.append(f"[{record['source']}]")
    return "  ".join(parts)


def describe_seconds(seconds: float | None) -> str:
    """Writes a duration as h:mm:ss, with days where needed; `?` if unknown."""
    return "?" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


def _compact(value: float) -> str:
    """Writes 12,345 as 12.3k, three figures or more."""
    for limit, divisor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / divisor:.1f}{unit}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _is_terminal(stream: IO[str] | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


@contextlib.contextmanager
def _unless_gone(stream: IO[str]) -> Iterator[None]:
    """Ignores that the reader has gone (closed pipe or terminal): the files have everything."""
    try:
        yield
    except OSError:
        pass
    except ValueError:
        if not stream.closed:
            raise


def _printable(text: str, stream: IO[str]) -> str:
    """Escapes what the stream's encoding lacks, so that a foreign name cannot end a run."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
