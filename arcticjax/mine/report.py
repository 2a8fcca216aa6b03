"""The report of a mining run: Markdown with pictures beside it, and one self-contained page."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcticjax.mine import figures, sweep
from arcticjax.mine.files import explained, write_whole
from arcticjax.mine.statistics import Statistics, share_text

FOLDER = "report"
MARKDOWN = "report.md"
# Characters of a text that are shown.
_SHOWN = 400

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;"
    "color:#222}table{border-collapse:collapse;margin:1rem 0}td,th{border-bottom:1px solid #ddd;"
    "padding:.2rem .8rem;text-align:right}td:first-child,th:first-child{text-align:left}"
    "img{max-width:100%}blockquote{margin:.5rem 0;padding-left:1rem;border-left:3px solid #ddd}"
)


@dataclass(frozen=True)
class Heading:
    text: str
    level: int


@dataclass(frozen=True)
class Picture:
    name: str
    png: bytes
    about: str


@dataclass(frozen=True)
class Quotes:
    """Texts to read, one to a line."""

    lines: Sequence[str]


Part = Heading | Picture | Quotes | str | list[list[str]]


def write_report(folder: Path, manifest: dict[str, Any], found: Sequence[Statistics]) -> Path:
    """Writes `report.md`, its PNG files and `report.html` into `folder`; returns the Markdown."""
    parts = _parts(manifest, found)
    with explained(folder):
        folder.mkdir(exist_ok=True)
    for part in parts:
        if isinstance(part, Picture):
            write_whole(folder / part.name, lambda file, part=part: file.write(part.png))
    page = to_html(parts)
    write_whole(folder / "report.html", lambda file: file.write(page.encode()))
    text = to_markdown(parts)
    path = folder / MARKDOWN
    write_whole(path, lambda file: file.write(text.encode()))
    return path


def _parts(manifest: dict[str, Any], found: Sequence[Statistics]) -> list[Part]:
    teacher = manifest["teacher"]
    contract = teacher["contract"]
    parts: list[Part] = [
        Heading("Mined candidates", 1),
        f"Teacher {teacher['name']} (sha256 {teacher['sha256'][:12]}), {contract['pooling']} "
        f"pooling, query prompt {contract['query_prompt']!r}, document prompt "
        f"{contract['document_prompt']!r}, at most {contract['query_length']} and "
        f"{contract['document_length']} tokens, {teacher['precision']}; the "
        f"{manifest['top_k']:,} best documents of each query, exactly.",
    ]
    for one in found:
        parts += _group(one, manifest["top_k"])
    return parts


def _group(one: Statistics, top_k: int) -> list[Part]:
    group = one.group
    few = one.sampled < group.queries
    return [
        Heading(group.name, 2),
        f"{group.queries:,} queries of {', '.join(group.sources)} among {group.documents:,} "
        "documents."
        + (f" Scores and yields are those of {one.sampled:,} of the queries." if few else ""),
        Heading("Scores", 3),
        Picture(
            f"{group.name}-scores.png",
            figures.draw_scores(one.histograms, f"{group.name}: scores"),
            "Histograms of the teacher's scores",
        ),
        "How many candidates outscore a query's best positive (of those among its "
        f"{top_k:,} best documents; where a positive was not found, that is all of them):",
        [
            ["candidates ahead of the positive", "queries", "share"],
            *(
                [name, f"{count:,}", share]
                for (name, count), share in zip(
                    one.ahead.items(), share_text(list(one.ahead.values())), strict=True
                )
            ),
        ],
        Heading("Yield", 3),
        f"What an upper threshold leaves; a query is kept if {one.minimum} candidates pass it. "
        "Relative thresholds are measured from the query's positive.",
        Picture(
            f"{group.name}-yield.png",
            figures.draw_yield(one.rows, one.minimum, f"{group.name}: yield"),
            "Queries kept and candidates left by threshold",
        ),
        sweep.table(one.rows),
        Heading("False negatives, estimated", 3),
        f"Candidates of {one.estimate.queries:,} random queries that are probably relevant: the "
        "same text but for case and punctuation, nearly the same (a Jaccard similarity of "
        "four-word sequences of 0.7), one that contains a positive whole, or one that the teacher "
        "scores above the best positive.",
        one.estimate.table(),
        *_examples(one),
    ]


def _examples(one: Statistics) -> list[Part]:
    if not one.examples:
        return []
    parts: list[Part] = [Heading("Examples", 3)]
    for example in one.examples:
        parts += [
            Quotes(
                [
                    f"query: {_short(example.query)}",
                    *(f"positive {score:.3f}: {_short(text)}" for score, text in example.positives),
                    *(
                        f"candidate {score:.3f}"
                        f"{' (' + ', '.join(found) + ')' if found else ''}: {_short(text)}"
                        for score, text, found in example.candidates
                    ),
                ]
            )
        ]
    return parts


def to_markdown(parts: Sequence[Part]) -> str:
    """The parts as Markdown; pictures are files beside it."""
    blocks = []
    for part in parts:
        if isinstance(part, Heading):
            blocks.append(f"{'#' * part.level} {part.text}")
        elif isinstance(part, Picture):
            blocks.append(f"![{part.about}]({part.name})")
        elif isinstance(part, Quotes):
            blocks.append("\n".join(f"> {_escaped(line)}  " for line in part.lines))
        elif isinstance(part, str):
            blocks.append(part)
        else:
            head, *rows = part
            lines = [head, ["---"] * len(head), *rows]
            blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(blocks) + "\n"


def to_html(parts: Sequence[Part]) -> str:
    """The parts as one page that needs no other file."""
    blocks = []
    for part in parts:
        if isinstance(part, Heading):
            blocks.append(f"<h{part.level}>{html.escape(part.text)}</h{part.level}>")
        elif isinstance(part, Picture):
            data = base64.b64encode(part.png).decode()
            blocks.append(
                f'<img alt="{html.escape(part.about)}" src="data:image/png;base64,{data}">'
            )
        elif isinstance(part, Quotes):
            lines = "<br>".join(html.escape(line) for line in part.lines)
            blocks.append(f"<blockquote>{lines}</blockquote>")
        elif isinstance(part, str):
            blocks.append(f"<p>{html.escape(part)}</p>")
        else:
            rows = [
                "".join(f"<{cell}>{html.escape(text)}</{cell}>" for text in row)
                for cell, row in zip(["th", *["td"] * (len(part) - 1)], part, strict=True)
            ]
            body = "".join(f"<tr>{row}</tr>" for row in rows)
            blocks.append(f"<table>{body}</table>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Mined candidates</title>'
        f"<style>{_STYLE}</style>\n" + "\n".join(blocks) + "\n</html>\n"
    )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."


def _escaped(line: str) -> str:
    """Text in which Markdown finds no marks of its own."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~$])", r"\\\1", line)
