"""Pictures of a mining report: scores as histograms, yields as lines."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from arcticjax.mine.statistics import BINS
from arcticjax.mine.sweep import GRIDS, Row, named

# Okabe and Ito's palette, which stays distinct under colour blindness (jfly.uni-koeln.de/color).
COLOURS = ("#0072B2", "#999999", "#D55E00", "#E69F00", "#009E73")
INK, FAINT = "#222222", "#D8D8D8"


def draw_scores(histograms: Mapping[str, np.ndarray], title: str) -> bytes:
    """PNG: how the teacher's scores spread, each histogram as a share of its own sum."""
    figure, (axes,) = _figure(1, title)
    middles = (BINS[:-1] + BINS[1:]) / 2
    used = [name for name, counts in histograms.items() if counts.sum()]
    for name, colour in zip(histograms, COLOURS, strict=True):
        if name in used:
            share = histograms[name] / histograms[name].sum()
            axes.fill_between(middles, share, step="mid", color=colour, alpha=0.15)
            axes.plot(middles, share, drawstyle="steps-mid", color=colour, label=name)
    seen = np.flatnonzero(sum(histograms[name] for name in used))
    if seen.size:
        axes.set_xlim(float(BINS[seen[0]]) - 0.02, float(BINS[seen[-1] + 1]) + 0.02)
    axes.set_ylim(bottom=0)
    _dress(axes, "teacher's score", "share")
    axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def draw_yield(rows: Sequence[Row], minimum: int, title: str) -> bytes:
    """PNG: queries kept and negatives of a query, against the upper threshold, by kind of rule."""
    figure, all_axes = _figure(len(GRIDS), title)
    for axes, kind in zip(all_axes, GRIDS, strict=True):
        chosen = sorted(
            (row for row in rows if row.threshold.kind == kind), key=lambda row: row.threshold.value
        )
        values = [row.threshold.value for row in chosen]
        kept = [100 * row.kept_share for row in chosen]
        axes.plot(values, kept, color=COLOURS[0], marker="o", markersize=4)
        axes.set_ylim(-3, 103)
        label = named(chosen[0].threshold) if chosen else kind
        _dress(axes, label, f"% of queries with {minimum} negatives")
        other = axes.twinx()
        mean = [row.mean_negatives for row in chosen]
        other.plot(values, mean, color=COLOURS[2], marker=".", linestyle="--")
        other.set_ylim(bottom=0)
        other.set_ylabel("eligible candidates a query", color=COLOURS[2], fontsize=9)
        other.spines[["top", "left"]].set_visible(False)
        other.tick_params(colors=COLOURS[2], length=0, labelsize=9)
    return _png(figure)


def _figure(panels: int, title: str) -> tuple[Figure, list[Axes]]:
    width = 8 if panels == 1 else 5 * panels
    figure = Figure(figsize=(width, 4), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK).set_parse_math(False)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _dress(axes: Axes, along: str, up: str) -> None:
    axes.set_xlabel(along, color=INK, fontsize=9)
    axes.set_ylabel(up, color=INK, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script the font lacks is drawn as boxes; that is no news to a log.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(picture, format="png")
    return picture.getvalue()
