"""Draws a run: loss per source, and nDCG@10 per retrieval task over the steps."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from arcticjax.errors import CheckpointError, DataError, ResourceError
from arcticjax.train.json_lines import read_json_lines, write_atomically
from arcticjax.train.report import METRICS_FILE, as_number
from arcticjax.train.result import AFTER, BEFORE, read_evaluation_records, read_result

PLOT_FILE = "report/loss_and_ndcg.png"
PLOTTED_METRIC = "ndcg_at_10"
MOST_SOURCES = 7  # more colours cannot be told apart; the rest share one grey
MOST_POINTS = 1500  # a series; about the width of a panel in pixels
FEW_POINTS = 200  # up to here every point is worth seeing
SMOOTHING = 0.05  # a running mean spans this part of a series, and at least 5 points
# Okabe and Ito's palette, which stays distinct under colour blindness (jfly.uni-koeln.de/color).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D31")
REST_COLOUR = "#999999"
INK, FAINT = "#222222", "#D8D8D8"

Series = tuple[np.ndarray, np.ndarray]  # steps, values


def plot_run(directory: Path) -> Path:
    """Draws RUN/report/loss_and_ndcg.png from metrics.jsonl and evaluations.jsonl; returns it.

    Lines that are no records are left out; where a file is missing or empty its panel says so.
    Without evaluations.jsonl, those in result.json are drawn. No matplotlib global is touched.
    Raises DataError if there is no such folder, ResourceError if the picture cannot be written.
    """
    if not directory.is_dir():
        raise DataError(f"run directory {directory} does not exist, so there is nothing to draw")
    records, _ = read_json_lines(directory / METRICS_FILE)
    figure = Figure(figsize=(14, 5), dpi=120, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    last_step = _draw_loss(left, records)
    _draw_ndcg(right, _ndcg_series(directory, last_step))
    title = figure.suptitle(
        directory.resolve().name, x=0.01, ha="left", fontsize=11, color=INK, fontweight="bold"
    )
    title.set_parse_math(False)
    picture = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script the font lacks is drawn as boxes; that is no news to a training log.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas.print_png(picture)
    path = directory / PLOT_FILE
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, picture.getvalue())
    except OSError as error:
        raise ResourceError(
            f"cannot write {path}: {error.strerror or error}; free disk space or set "
            "report.plots=false"
        ) from error
    return path


def _draw_loss(axes: Axes, records: Sequence[Mapping[str, Any]]) -> int:
    """Draws points and a running mean per source; returns the last logged step, 0 if none."""
    _dress(axes, "Training loss per source", "loss")
    series = _loss_series(records)
    if not series:
        _say(axes, "no logged steps")
        return max((record["step"] for record in records), default=0)
    entries: list[tuple[Line2D, str]] = []
    for rank, (name, (steps, losses)) in enumerate(series.items()):
        rest = rank == MOST_SOURCES
        colour = REST_COLOUR if rest else COLOURS[rank]
        fine_steps, fine_losses = _binned(steps, losses)
        size, alpha = (7, 0.5) if len(records) <= FEW_POINTS else (3, 0.3)
        dots = {"linestyle": "", "marker": ".", "markersize": size, "markeredgewidth": 0}
        axes.plot(fine_steps, fine_losses, color=colour, alpha=alpha, **dots)
        (line,) = axes.plot(*_running_mean(steps, losses), color=colour, linewidth=1.6)
        entries.append((line, _short(name)))
    if len(series) > 1:
        everything = _series(records)
        (line,) = axes.plot(*_running_mean(*everything), color=INK, linewidth=2.2)
        entries.append((line, "all sources"))
    broken = [record["step"] for record in records if _loss_broke(record)]
    if broken:
        marks = {"linestyle": "", "marker": "x", "markersize": 7, "color": "#B00020"}
        (line,) = axes.plot(
            broken, np.full(len(broken), 0.97), transform=axes.get_xaxis_transform(), **marks
        )
        entries.append((line, "loss not finite"))
    _legend(axes, entries, outside=True)
    last_step = max(record["step"] for record in records)
    axes.set_xlim(0, 1.02 * last_step)
    return last_step


def _draw_ndcg(axes: Axes, tasks: Mapping[str, list[tuple[int, float]]]) -> None:
    """Draws a line per task with its first and last value written beside the ends."""
    _dress(axes, "Retrieval on held-out tasks", "nDCG@10")
    if not tasks:
        _say(axes, "no evaluations")
        return
    entries = []
    for rank, (task, points) in enumerate(tasks.items()):
        colour = COLOURS[rank] if rank < len(COLOURS) else REST_COLOUR
        steps = [step for step, _ in points]
        values = [value for _, value in points]
        (line,) = axes.plot(
            steps, values, color=colour, linewidth=1.8, marker="o", markersize=5, clip_on=False
        )
        told = f"{values[0]:.3f}"
        if len(values) > 1:
            told += f" to {values[-1]:.3f} ({values[-1] - values[0]:+.3f})"
        entries.append((line, f"{_short(task)}  {told}"))
    everything = [value for points in tasks.values() for _, value in points]
    low, high = min(everything), max(everything)
    # At least 0.05 tall: noise in the third place must not fill the panel.
    margin = max(0.15 * (high - low), (0.05 - (high - low)) / 2, 0.01)
    axes.set_ylim(max(low - margin, 0.0), min(high + margin, 1.0))
    last = max(step for points in tasks.values() for step, _ in points)
    axes.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
    _legend(axes, entries, outside=False)


def _loss_series(records: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Groups losses by source, most steps first; sources past `MOST_SOURCES` become one."""
    by_source: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_source.setdefault(str(record.get("source") or "loss"), []).append(record)
    ordered = sorted(by_source.items(), key=lambda item: (-len(item[1]), item[0]))
    rest = ordered[MOST_SOURCES:]
    if len(rest) == 1:  # one more needs no group, only the grey
        groups = dict(ordered)
    else:
        groups = dict(ordered[:MOST_SOURCES])
        if rest:
            names = {name for name, _ in rest}
            groups[f"{len(rest)} more sources"] = [
                record for record in records if str(record.get("source") or "loss") in names
            ]
    series = {name: _series(group) for name, group in groups.items()}
    return {name: pair for name, pair in series.items() if len(pair[0])}


def _series(records: Sequence[Mapping[str, Any]]) -> Series:
    points = [(r["step"], x) for r in records if (x := as_number(r.get("loss"))) is not None]
    steps, losses = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps, np.float64), np.asarray(losses, np.float64)


def _loss_broke(record: Mapping[str, Any]) -> bool:
    lost = record.get("non_finite")
    return isinstance(lost, Mapping) and "loss" in lost


def _ndcg_series(directory: Path, last_step: int) -> dict[str, list[tuple[int, float]]]:
    """Collects (step, nDCG@10) per task in step order; a step's later evaluation wins."""
    found: dict[str, dict[int, float]] = {}
    for record in read_evaluation_records(directory):
        if (value := as_number(record.get(PLOTTED_METRIC))) is not None:
            found.setdefault(record["task"], {})[record["step"]] = value
    if not found:
        found = _from_result(directory, last_step)
    return {task: sorted(points.items()) for task, points in found.items()}


def _from_result(directory: Path, last_step: int) -> dict[str, dict[int, float]]:
    try:
        result = read_result(directory)
    except CheckpointError:
        return {}  # a torn result.json is reported by whoever reads it for its own sake
    if result is None:
        return {}
    found: dict[str, dict[int, float]] = {}
    named = {BEFORE: 0, AFTER: result.steps or last_step}
    for label, tasks in result.evaluations.items():
        step = named.get(label, int(label) if label.isdecimal() else None)
        for task, metrics in tasks.items():
            if step is not None and (value := metrics.get(PLOTTED_METRIC)) is not None:
                found.setdefault(task, {})[step] = value
    return found


def _running_mean(steps: np.ndarray, values: np.ndarray) -> Series:
    """Averages each point with those before it, over `SMOOTHING` of the series or 5 points."""
    width = max(5, round(SMOOTHING * len(values)))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    return _binned(steps, means)


def _binned(steps: np.ndarray, values: np.ndarray) -> Series:
    """Averages neighbours until at most `MOST_POINTS` remain."""
    size = -(-len(values) // MOST_POINTS)
    if size <= 1:
        return steps, values
    starts = np.arange(0, len(values), size)
    counts = np.diff(np.append(starts, len(values)))
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def _dress(axes: Axes, title: str, quantity: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(quantity, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=REST_COLOUR)
    axes.set_xticks([])
    axes.set_yticks([])


def _short(name: str) -> str:
    return name if len(name) <= 32 else name[:29] + "..."


def _legend(axes: Axes, entries: Sequence[tuple[Line2D, str]], *, outside: bool) -> None:
    # Matplotlib hides labels that begin with _ and reads $ as mathematics, so names come after.
    numbers = [str(i) for i in range(len(entries))]
    lines = [line for line, _ in entries]
    if outside:
        legend = axes.legend(
            lines, numbers, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9
        )
    else:
        legend = axes.legend(lines, numbers, loc="best", fontsize=9)
    legend.get_frame().set(facecolor="white", edgecolor="none", alpha=0.8)
    for text, (_, name) in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
        text.set_color(INK)
