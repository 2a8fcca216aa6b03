"""The pictures of a report: scores beside published ones, and size against quality."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from arcticjax.evaluate.summary import Row

# Of Okabe and Ito's palette, which stays distinct under colour blindness.
OURS, KINDS = "#0072B2", {"float32": "#0072B2", "int8": "#D55E00", "int4": "#009E73"}
OTHERS = ("#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
INK, FAINT = "#222222", "#D8D8D8"


def draw_scores(rows: Sequence[Row], published: Mapping[str, Mapping[str, float]]) -> bytes:
    """PNG: a point and its interval for each retrieval score, published ones beside it."""
    shown = [row for row in rows if row.ndcg is not None and row.interval is not None]
    figure, axes = _figure(8.0, 1.6 + 0.32 * len(shown))
    places = list(range(len(shown)))
    for colour, (model, values) in zip(OTHERS, published.items(), strict=False):
        points = [
            (values[row.name], place) for place, row in enumerate(shown) if row.name in values
        ]
        if points:
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, "|", color=colour, markersize=11, markeredgewidth=2, label=model)
    for place, row in enumerate(shown):
        assert row.interval is not None
        axes.plot(row.interval, (place, place), color=OURS, linewidth=2)
    values = [row.metrics["ndcg_at_10"] for row in shown]
    axes.plot(values, places, "o", color=OURS, markersize=6, label="this model")
    # Matplotlib reads $ as mathematics.
    axes.set_yticks(places, [row.name for row in shown], parse_math=False)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel("nDCG@10, with the 95 % interval over queries", color=INK)
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return _png(figure)


def draw_sizes(name: str, sizes: Sequence[tuple[str, int, int, float]]) -> bytes:
    """PNG: bytes per vector, on a logarithmic axis, against nDCG@10 of the score `name`."""
    figure, axes = _figure(8.0, 4.2)
    for kind, colour in KINDS.items():
        rows = [row for row in sizes if row[0].partition("@")[0] == kind]
        if rows:
            axes.plot(
                [row[2] for row in rows],
                [row[3] for row in rows],
                "o-",
                color=colour,
                linewidth=1.5,
                label=kind,
            )
        for _, dimension, size, value in rows:
            axes.annotate(
                str(dimension), (size, value), xytext=(0, 7), textcoords="offset points",
                ha="center", fontsize=8, color=INK,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    powers = range(
        math.floor(math.log2(min(row[2] for row in sizes))),
        math.ceil(math.log2(max(row[2] for row in sizes))) + 1,
    )
    axes.set_xticks([2**power for power in powers], [f"{2**power:,}" for power in powers])
    values = [row[3] for row in sizes]
    margin = max(0.15 * (max(values) - min(values)), 0.01)
    axes.set_ylim(max(min(values) - margin, 0.0), min(max(values) + margin, 1.0))
    axes.set_xlabel("bytes per vector (the number at a point: its dimensions)", color=INK)
    axes.set_ylabel("nDCG@10", color=INK)
    axes.set_title(name, color=INK, fontsize=10, parse_math=False)
    axes.legend(frameon=False, loc="lower right")
    return _png(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.grid(axis="both", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(picture, format="png")
    return picture.getvalue()
