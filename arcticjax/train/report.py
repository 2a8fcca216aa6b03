"""What a run tells while it runs: metrics.jsonl, evaluations.jsonl, train.log and the console."""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from arcticjax.errors import ResourceError
from arcticjax.train.console import Console, open_console
from arcticjax.train.json_lines import JsonLines
from arcticjax.train.tensorboard import ScalarWriter

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
LOG_FILE = "train.log"
TENSORBOARD_FOLDER = "tensorboard"
METRIC_FIELDS = (
    "step",
    "loss",
    "source",
    "learning_rate",
    "gradient_norm",
    "accuracy",
    "fill",
    "pairs_per_second",
    "tokens_per_second",
    "data_wait_fraction",
)
MEAN_WINDOW = 50  # logged steps of a source: short enough to follow a run, long enough to be calm
PACE_WINDOW = 20  # logged steps: the time left follows a change of pace within this many


class Report:
    """Writes a run's records and shows its progress; a context manager that closes itself.

    Records are whole lines, flushed one by one. On resume, records after `start_step` go and the
    means per source start from those that stay, so a resumed run reports like a straight one.
    Not for several threads.
    """

    def __init__(
        self,
        directory: Path,
        *,
        total_steps: int,
        start_step: int,
        tensorboard: bool,
        talk: bool,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Opens the files of a run directory, which is created if need be.

        total_steps, start_step: optimizer steps; `start_step` are done already, 0 for a new run.
        talk: False on every process but the first: then no file is touched and nothing is shown.
        stream: where progress goes, default stderr; a live bar if it is a terminal, else lines.
        clock: seconds, for the time left and the pace of plain lines.
        tensorboard: whether RUN/tensorboard mirrors the finite numbers.
        Raises ResourceError if a file cannot be written.
        """
        self._talk = talk
        self._total_steps = total_steps
        self._step = start_step
        self._clock = clock
        self._pace: deque[tuple[float, int]] = deque(maxlen=PACE_WINDOW)
        self._sources: dict[str, _SourceMeans] = {}
        self._tensorboard: ScalarWriter | None = None
        self._opened = contextlib.ExitStack()  # closed in reverse: the terminal first
        if not talk:
            return
        with contextlib.ExitStack() as opened:
            self._log = opened.enter_context(_open_log(directory / LOG_FILE))
            self._metrics = JsonLines(directory / METRICS_FILE, last_step=start_step)
            opened.callback(self._metrics.close)
            # A run that begins anew scores step 0 anew, maybe other tasks with another config.
            last_scored = start_step if start_step else -1
            self._evaluations = JsonLines(directory / EVALUATIONS_FILE, last_step=last_scored)
            opened.callback(self._evaluations.close)
            if tensorboard:
                self._tensorboard = _open_tensorboard(directory / TENSORBOARD_FOLDER, start_step)
                opened.callback(self._tensorboard.close)
            self._console: Console = open_console(stream, total_steps, start_step, clock)
            opened.callback(self._console.close)
            self._opened = opened.pop_all()
        for record in self._metrics.kept:
            self._add_to_source(record)
        self._metrics.kept.clear()  # a long run's records would stay in memory
        for lines in (self._metrics, self._evaluations):
            if lines.rejected:
                self.note(
                    f"{lines.path.name}: {lines.rejected} unreadable line(s) set aside in "
                    f"{lines.path.name}.rejected"
                )
            if lines.dropped:
                self.note(
                    f"{lines.path.name}: dropped {lines.dropped} line(s) after step {start_step}, "
                    "which the resumed run writes again"
                )

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes, so that a failed run leaves the terminal as it was."""
        self.close()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Records one logged step.

        metrics: `METRIC_FIELDS`, of which `step` is required, and any more with a JSON form. Rates
        are per second of wall time, fractions lie in [0, 1]. Non-finite numbers become null.
        """
        step = int(metrics["step"])
        self._step = step
        record = {name: metrics[name] for name in METRIC_FIELDS if name in metrics}
        record |= {name: value for name, value in metrics.items() if name not in record}
        record = {name: _python(value) for name, value in record.items()} | {"step": step}
        self._pace.append((self._clock(), step))
        self._add_to_source(record)
        if not self._talk:
            return
        self._metrics.append(record)
        scalars = {name: value for name, value in record.items() if name != "step"}
        if isinstance(source := record.get("source"), str) and "loss" in record:
            scalars[f"loss/{source}"] = record["loss"]
        self._mirror(scalars, step)
        self._console.progress(record, self.seconds_left())

    def evaluation(
        self,
        step_or_name: int | str,
        tasks: Mapping[str, Mapping[str, float]],
        *,
        step: int | None = None,
    ) -> None:
        """Records one evaluation of all tasks.

        step_or_name: the step, or "before" | "after" training.
        tasks: task -> metric -> value in [0, 1].
        step: where on the step axis a named one belongs; default the last step reported.
        """
        if not self._talk:
            return
        if not isinstance(step_or_name, str):
            step = step_or_name = int(step_or_name)
        elif step is None:
            step = self._step
        for task, values in tasks.items():
            metrics = {name: _python(value) for name, value in values.items()}
            head = {"step": step, "label": step_or_name, "task": task}
            self._evaluations.append({**head, **metrics})
            self._mirror({f"evaluation/{task}/{name}": x for name, x in metrics.items()}, step)
            told = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            self.note(f"evaluation {step_or_name}: {task}  {told}")

    def note(self, text: str) -> None:
        """Says something above the bar and in train.log, where it carries the time in UTC."""
        if not self._talk:
            return
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        indented = text.replace("\n", "\n" + " " * (len(now) + 1))
        try:
            self._log.write(f"{now} {indented}\n")
            self._log.flush()
        except OSError as error:
            raise _unwritable(Path(self._log.name), error) from error
        self._console.say(text)

    def seconds_left(self) -> float | None:
        """Estimates wall seconds to the last step from the recent pace.

        None until two steps are logged: the time to the first holds start-up and compilation.
        """
        if len(self._pace) < 2:
            return None
        (first_time, first_step), (last_time, last_step) = self._pace[0], self._pace[-1]
        if last_step <= first_step:
            return None
        pace = (last_time - first_time) / (last_step - first_step)
        return max(self._total_steps - last_step, 0) * pace

    def source_means(self) -> list[dict[str, Any]]:
        """Summarises the sources, most steps first: source, steps, last_step, loss, accuracy.

        steps counts logged ones. loss and accuracy are means over a source's last `MEAN_WINDOW`
        finite values, None if there are none.
        """
        rows = [means.row(name) for name, means in self._sources.items()]
        return sorted(rows, key=lambda row: (-row["steps"], row["source"]))

    def close(self) -> None:
        """Ends the bar and closes the files; harmless when repeated."""
        self._opened.close()

    def _add_to_source(self, record: Mapping[str, Any]) -> None:
        source = record.get("source")
        if isinstance(source, str):
            self._sources.setdefault(source, _SourceMeans()).add(record)

    def _mirror(self, values: Mapping[str, Any], step: int) -> None:
        """Copies finite numbers to TensorBoard; a mirror that fails never stops training."""
        if self._tensorboard is None:
            return
        try:
            numbers = {name: as_number(value) for name, value in values.items()}
            self._tensorboard.add({k: v for k, v in numbers.items() if v is not None}, step)
        except OSError as error:
            self._tensorboard = None
            self.note(f"TensorBoard's files end before step {step}: {error.strerror or error}")


def as_number(value: Any) -> float | None:
    """Returns a finite float, or None for anything else: text, a bool, null, NaN, infinity."""
    if isinstance(value, bool | str | bytes) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _python(value: Any) -> Any:
    """Turns NumPy and jax arrays and scalars into Python's numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value


class _SourceMeans:
    """One source's recent losses and accuracies."""

    def __init__(self) -> None:
        self.steps = 0
        self.last_step = 0
        self.recent = {name: deque(maxlen=MEAN_WINDOW) for name in ("loss", "accuracy")}

    def add(self, record: Mapping[str, Any]) -> None:
        self.steps += 1
        self.last_step = int(record["step"])
        for name, values in self.recent.items():
            if (number := as_number(record.get(name))) is not None:
                values.append(number)

    def row(self, source: str) -> dict[str, Any]:
        means = {k: math.fsum(v) / len(v) if v else None for k, v in self.recent.items()}
        return {"source": source, "steps": self.steps, "last_step": self.last_step, **means}


def _open_log(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise _unwritable(path, error) from error


def _open_tensorboard(folder: Path, start_step: int) -> ScalarWriter:
    try:
        return ScalarWriter(folder, purge_step=start_step + 1)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(path: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"cannot write {path}: {error.strerror or error}; "
        "free disk space or make run.directory writable, then run the same command again"
    )
