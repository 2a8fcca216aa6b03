"""Rules for hard negatives, several positives and what the loss makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from arcticjax.config.problem import Path, Problem


def _hard_negatives(config: Any) -> Iterator[Problem]:
    data, loss = config.data, config.loss
    negatives = data.negatives
    if negatives is None:
        for index, source in enumerate(data.sources):
            for name in ("candidates", "corpus", "negatives", "scores", "parents"):
                if getattr(source, name):
                    yield (
                        ("data", "sources", index, name),
                        "has no effect without data.negatives; say there how many are taken "
                        "(count), or remove it",
                    )
        if data.positives > 1:
            yield (
                ("data", "positives"),
                "several positives need data.negatives; add it (count: 0 for no hard negatives)",
            )
    if not loss.in_batch_negatives and (negatives is None or not negatives.count):
        yield (
            ("loss", "in_batch_negatives"),
            "false leaves a query without negatives; set data.negatives.count, or leave it true",
        )
    if negatives is None or not negatives.count:
        return
    for index, source in enumerate(data.sources):
        # Files of these kinds may hold negatives of their own.
        if not (source.candidates or source.negatives or _brings_negatives(source.path)):
            yield (
                ("data", "sources", index),
                "has no hard negatives; give candidates (a mined folder) or negatives (columns)",
            )
    if data.docstrings is not None:
        yield (
            ("data", "docstrings"),
            "docstring sources have no hard negatives; remove it or data.negatives",
        )


def _brings_negatives(path: str) -> bool:
    kind, _, rest = path.partition(":")
    return kind == "arctictraining" or (kind == "msmarco" and "negatives=" in rest)


def _one_origin_of_negatives(config: Any) -> Iterator[Problem]:
    for index, source in enumerate(config.data.sources):
        if source.candidates and source.negatives:
            yield (
                ("data", "sources", index, "negatives"),
                "the source has candidates too, and a query's negatives come from one of the two; "
                "remove one",
            )
        if source.corpus and not source.candidates:
            yield (
                ("data", "sources", index, "corpus"),
                "only candidates are of a corpus beside the pairs; add candidates, or remove it",
            )
        if source.scores and not source.negatives:
            yield (
                ("data", "sources", index, "scores"),
                "scores belong to columns of negatives; add negatives, or remove it (mined "
                "candidates bring their own)",
            )


def _parents(config: Any) -> Iterator[Problem]:
    for index, source in enumerate(config.data.sources):
        path: Path = ("data", "sources", index, "parents")
        if source.parents and config.data.negatives is not None:
            if not (source.candidates or source.negatives):
                yield path, "has no effect without candidates or negatives; remove it"
            elif source.candidates and len(source.parents) > 1:
                yield path, "candidates are documents of the source; name the document's column"


def _thresholds(config: Any) -> Iterator[Problem]:
    negatives = config.data.negatives
    if negatives is None:
        return
    path: Path = ("data", "negatives")
    for name in ("upper", "lower"):
        threshold = getattr(negatives.thresholds, name)
        if threshold is not None and threshold.kind == "percent" and not 0 < threshold.value <= 1:
            yield (
                (*path, "thresholds", name, "value"),
                f"percent is a share above 0 and up to 1, got {threshold.value}; 0.95 stands for "
                "95 %",
            )
    if negatives.window.last is not None and negatives.window.last < negatives.window.first:
        yield (
            (*path, "window", "last"),
            f"{negatives.window.last} comes before first = {negatives.window.first}; no rank is "
            "left",
        )


def _curriculum(config: Any) -> Iterator[Problem]:
    negatives = config.data.negatives
    if negatives is None or negatives.curriculum is None:
        return
    path: Path = ("data", "negatives", "curriculum", "points")
    points = negatives.curriculum.points
    if points[0].start != 0:
        yield (*path, 0, "start"), f"the first point begins at 0, got {points[0].start}"
    for index, point in enumerate(points):
        if index and point.start <= points[index - 1].start:
            yield (
                (*path, index, "start"),
                f"{point.start} is not after point {index - 1} at {points[index - 1].start}",
            )
        for name in ("upper", "lower"):
            if getattr(point, name) is not None and getattr(negatives.thresholds, name) is None:
                yield (
                    (*path, index, name),
                    f"replaces data.negatives.thresholds.{name}, which is not there; give its "
                    "kind and value",
                )
        first = point.first or negatives.window.first
        last = point.last or negatives.window.last
        if last is not None and last < first:
            yield (*path, index), f"ranks {first} to {last} leave none"


def _distillation(config: Any) -> Iterator[Problem]:
    negatives = config.data.negatives
    if config.loss.distillation is None:
        return
    if negatives is None or not negatives.count:
        yield (
            ("loss", "distillation"),
            "needs a teacher's scores of hard negatives; set data.negatives.count, or remove it",
        )
    for index, source in enumerate(config.data.sources):
        if source.negatives and not source.scores:
            yield (
                ("data", "sources", index, "scores"),
                "loss.distillation needs the teacher's scores of these negatives; name their "
                "columns",
            )


def _own_documents_only(config: Any) -> Iterator[Problem]:
    loss = config.loss
    if loss.in_batch_negatives:
        return
    for name in ("symmetric", "query_query", "document_query", "document_document"):
        if getattr(loss, name):
            yield (
                ("loss", name),
                "takes negatives from the whole batch, which in_batch_negatives: false rules out; "
                "set one of the two otherwise",
            )
    if loss.guide is not None:
        yield (
            ("loss", "guide"),
            "looks for false negatives in the whole batch, which in_batch_negatives: false rules "
            "out; cut a query's own negatives by data.negatives.thresholds, or set it true",
        )


RULES: tuple[Callable[[Any], Iterator[Problem]], ...] = (
    _hard_negatives,
    _parents,
    _one_origin_of_negatives,
    _thresholds,
    _curriculum,
    _distillation,
    _own_documents_only,
)
