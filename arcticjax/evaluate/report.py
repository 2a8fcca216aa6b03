"""The report of an evaluation: results.json, report.json, report.md and report.html."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcticjax.evaluate import plots
from arcticjax.evaluate.progress import seconds
from arcticjax.evaluate.records import Record, write_bytes, write_json
from arcticjax.evaluate.summary import Comparison, Row, Summary, compare, sizes, summarize
from arcticjax.export.scores import REPORT_FILE, RESULTS_FILE
from arcticjax.scoring import benchmarks
from arcticjax.scoring.compression import FULL, Compression

SCORES_PLOT, SIZES_PLOT = "scores.png", "sizes.png"
DASH = "-"


@dataclass(frozen=True)
class About:
    """What was evaluated, for the head of the report. model: as the user named it. facts: further
    lines, as (what, value). encoder: what `export.scores` knows the model by. datasets: task ->
    where MTEB has its data. parameters: of the encoder. length: tokens where texts were cut."""

    model: str
    revision: str
    width: int
    compressions: list[Compression]
    facts: list[tuple[str, str]]
    encoder: Mapping[str, Any]
    datasets: Mapping[str, Mapping[str, str]]
    parameters: int
    length: int


@dataclass(frozen=True)
class Table:
    """A table of texts; `title` may hold a remark after a line break."""

    title: str
    head: list[str]
    rows: list[list[str]]


def write(output: Path, about: About, records: Sequence[Record]) -> Summary:
    """Writes all files of the report into `output`; ResourceError if that fails."""
    summary = summarize(records)
    comparison = compare(summary, about.parameters)
    tables = make_tables(about, summary, comparison)
    pictures = _pictures(about, summary, comparison)
    for name, picture in pictures.items():
        write_bytes(output / name, picture)
    write_bytes(output / "report.md", _markdown(about, tables, pictures).encode())
    write_bytes(output / "report.html", _html(about, tables, pictures).encode())
    write_json(output / REPORT_FILE, _details(about, summary, comparison))
    write_json(output / RESULTS_FILE, results(about, summary, records))
    return summary


def results(about: About, summary: Summary, records: Sequence[Record]) -> dict[str, Any]:
    """results.json: task -> metrics, with `model`, `revision` and `seconds` beside; folded scores
    are there too."""
    found: dict[str, Any] = {one.identity.task: one.metrics for one in records}
    found |= {row.name: row.metrics for row in summary.rows}
    return found | {
        "model": about.model,
        "revision": about.revision,
        "seconds": sum(one.seconds for one in records),
    }


def make_tables(about: About, summary: Summary, comparison: Comparison | None) -> list[Table]:
    """Scores; published ones beside them; sizes of vectors; each only if there is something to
    say."""
    rows = [*summary.rows, *summary.means.values()]
    tables = [
        Table(
            "Scores",
            ["", "nDCG@10", "95 %", "MRR@10", "recall@100", "queries", "documents", "time"],
            [_score_row(row) for row in rows if row.ndcg is not None],
        )
    ]
    others = [row for row in summary.rows if row.ndcg is None]
    if others:
        tables.append(
            Table(
                "Other tasks",
                ["", "main score", "time"],
                [
                    [row.name, _number(row.metrics["main_score"]), seconds(row.seconds)]
                    for row in others
                ],
            )
        )
    if not tables[0].rows:
        tables.pop(0)
    if comparison is not None:
        tables += _comparison_tables(about, summary, comparison)
    if len(about.compressions) > 1:
        tables += _size_tables(about, summary)
    return tables


def to_text(table: Table) -> str:
    """The table with columns of spaces, for a terminal."""
    lines = [table.head, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _score_row(row: Row) -> list[str]:
    return [
        row.name,
        _number(row.ndcg),
        _interval(row.interval),
        _number(row.metrics.get("mrr_at_10")),
        _number(row.metrics.get("recall_at_100")),
        f"{row.queries:,}",
        f"{row.documents:,}",
        seconds(row.seconds),
    ]


def _comparison_tables(about: About, summary: Summary, comparison: Comparison) -> list[Table]:
    ours = [row for row in summary.rows if row.name in benchmarks.RETRIEVAL_15]
    remark = "In brackets: ours less theirs. The nearest in size come first."
    if about.length != benchmarks.PUBLISHED_LENGTH:
        remark += (
            f"\nNot the published protocol: texts were cut at {about.length} tokens here, it cuts "
            f"at {benchmarks.PUBLISHED_LENGTH}."
        )
    tables = [
        Table(
            f"Beside published nDCG@10\n{remark}",
            ["", "parameters", *(row.name for row in ours)],
            [
                [
                    "ours",
                    f"{about.parameters / 1e6:,.0f} M",
                    *(f"{_number(row.ndcg)} [{_interval(row.interval)}]" for row in ours),
                ],
                *(
                    [
                        model,
                        DASH if comparison.sizes[model] is None else f"{comparison.sizes[model]} M",
                        *(_beside(values.get(row.name), row.ndcg) for row in ours),
                    ]
                    for model, values in comparison.by_task.items()
                ),
            ],
        )
    ]
    if comparison.means:
        mean = next(iter(summary.means.values()))
        tables.append(
            Table(
                f"Beside published means of the fifteen\nOurs: {_number(mean.ndcg)} "
                f"({_interval(mean.interval)}).",
                ["", "mean nDCG@10", "ours less theirs"],
                [
                    [model, _number(value), f"{(mean.ndcg or 0.0) - value:+.4f}"]
                    for model, value in sorted(comparison.means.items(), key=lambda one: -one[1])
                ],
            )
        )
    return tables


def _size_tables(about: About, summary: Summary) -> list[Table]:
    # Of the means, where there are any; of every score else.
    rows = list(summary.means.values()) or [row for row in summary.rows if row.compressed]
    tables = []
    for row in rows:
        whole = row.compressed[str(FULL)]
        tables.append(
            Table(
                f"Sizes of vectors: {row.name}",
                ["", "dimensions", "bytes per vector", "vectors per GiB", "nDCG@10", "of float32"],
                [
                    [
                        name,
                        str(dimension),
                        f"{size:,}",
                        f"{2**30 / size / 1e6:.2f} M",
                        _number(value),
                        f"{100 * value / whole:.1f} %" if whole else DASH,
                    ]
                    for name, dimension, size, value in sizes(
                        about.compressions, about.width, row.compressed
                    )
                ],
            )
        )
    return tables


def _pictures(about: About, summary: Summary, comparison: Comparison | None) -> dict[str, bytes]:
    rows = [row for row in [*summary.rows, *summary.means.values()] if row.ndcg is not None]
    if not rows:
        return {}
    found = {SCORES_PLOT: plots.draw_scores(rows, comparison.by_task if comparison else {})}
    if len(about.compressions) > 1 and rows[-1].compressed:
        found[SIZES_PLOT] = plots.draw_sizes(
            rows[-1].name, sizes(about.compressions, about.width, rows[-1].compressed)
        )
    return found


def _markdown(about: About, tables: Sequence[Table], pictures: dict[str, bytes]) -> str:
    lines = [f"# Evaluation of {_cell(about.model)}", ""]
    lines += [f"- {what}: {_cell(value)}" for what, value in _facts(about)]
    for table in tables:
        title, *remarks = table.title.split("\n")
        lines += ["", f"## {_cell(title)}", "", *(line for one in remarks for line in (one, ""))]
        lines.append("| " + " | ".join(map(_cell, table.head)) + " |")
        lines.append("|---|" + "---:|" * (len(table.head) - 1))
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in table.rows]
    for name in pictures:
        lines += ["", f"![{name.removesuffix('.png')}]({name})"]
    return "\n".join(lines) + "\n"


def _html(about: About, tables: Sequence[Table], pictures: dict[str, bytes]) -> str:
    title = html.escape(f"Evaluation of {about.model}")
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{title}</title><style>",
        "body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:70em;margin:2em auto;"
        "padding:0 1em}table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}"
        "td,th{padding:.2em .8em;border-bottom:1px solid #d8d8d8;text-align:right}"
        "td:first-child,th:first-child{text-align:left}img{max-width:100%}",
        f"</style></head><body><h1>{title}</h1><ul>",
        *(f"<li>{what}: {html.escape(value)}</li>" for what, value in _facts(about)),
        "</ul>",
    ]
    for name, picture in pictures.items():
        data = base64.b64encode(picture).decode()
        parts.append(f'<img alt="{name}" src="data:image/png;base64,{data}">')
    for table in tables:
        head, *remarks = table.title.split("\n")
        parts.append(f"<h2>{html.escape(head)}</h2>")
        parts += [f"<p>{html.escape(remark)}</p>" for remark in remarks]
        parts.append("<table>")
        for tag, row in (("th", table.head), *(("td", row) for row in table.rows)):
            cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            parts.append(f"<tr>{cells}</tr>")
        parts.append("</table>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _details(about: About, summary: Summary, comparison: Comparison | None) -> dict[str, Any]:
    return {
        "model": about.model,
        "revision": about.revision,
        "facts": dict(about.facts),
        "encoder": dict(about.encoder),
        "tasks": {
            row.name: {
                "metrics": row.metrics,
                "compressed": row.compressed,
                "dataset": about.datasets.get(row.name),
            }
            for row in summary.tasks
        },
        "scores": {row.name: _plain(row) for row in summary.rows},
        "means": {row.name: _plain(row) for row in summary.means.values()},
        "bytes_per_vector": {
            str(one): one.bytes_per_vector(about.width) for one in about.compressions
        },
        "published": comparison and dataclasses.asdict(comparison),
    }


def _plain(row: Row) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(row).items() if key != "name"}


def _facts(about: About) -> list[tuple[str, str]]:
    return [("revision", about.revision), *about.facts]


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:.4f}"


def _interval(pair: tuple[float, float] | None) -> str:
    return DASH if pair is None else f"{pair[0]:.4f} to {pair[1]:.4f}"


def _beside(theirs: float | None, ours: float | None) -> str:
    if theirs is None or ours is None:
        return DASH
    return f"{theirs:.4f} ({ours - theirs:+.4f})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
