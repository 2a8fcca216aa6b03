"""Rules that tie several fields of a config together.

Each rule looks at a config and yields (path of the field to change, what is wrong and what to do).
The rules also run on a config some of whose fields are wrong, so that one report holds everything:
reading such a field raises `Unknown`, and the rule that did so is left out.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Path = tuple[str | int, ...]
Problem = tuple[Path, str]


class Unknown(Exception):
    """The field that a rule reads has no valid value, which is reported elsewhere."""


def cross_field_problems(config: Any) -> list[Problem]:
    """Every broken rule; `config` is a RunConfig or has its attributes."""
    problems = []
    for rule in _RULES:
        try:
            problems.extend(rule(config))
        except Unknown:
            continue
    return problems


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The name most like `name`, or that it shortens, whatever its case; None if none is close."""
    lowered = {known.lower(): known for known in names}
    found = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.6)
    if not found and len(name) > 2:
        found = [known for known in lowered if known.startswith(name.lower())]
    return lowered[found[0]] if found else None


def _one_start(config: Any) -> Iterator[Problem]:
    init, preset = config.model.init, config.model.preset
    if init is None and preset is None:
        yield (
            ("model",),
            "neither init nor preset is given; set model.init to a folder or hub name, or "
            "model.preset to a size such as xs, m or m-v2",
        )
    if init is not None and preset is not None:
        yield (
            ("model", "preset"),
            f"preset ({preset}) and init ({init}) are both given; keep one of them",
        )


def _preset_tokenizer(config: Any) -> Iterator[Problem]:
    model = config.model
    if model.preset is not None and model.init is None and model.tokenizer is None:
        yield (
            ("model", "tokenizer"),
            "a preset has no tokenizer of its own; give a tokenizer.json or the folder that "
            "holds it",
        )


def _some_data(config: Any) -> Iterator[Problem]:
    if not config.data.sources and config.data.docstrings is None:
        yield (
            ("data",),
            "nothing to train on; give data.sources or data.docstrings ({} takes its defaults)",
        )


def _unique_names(config: Any) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, source in enumerate(config.data.sources):
        if source.name in first:
            yield (
                ("data", "sources", index, "name"),
                f"{source.name!r} is already the name of data.sources.{first[source.name]}; "
                "names must differ",
            )
        first.setdefault(source.name, index)


def _columns_differ(config: Any) -> Iterator[Problem]:
    for index, source in enumerate(config.data.sources):
        if source.query == source.document:
            yield (
                ("data", "sources", index, "document"),
                f"query and document are the same column ({source.query!r}); every pair would be "
                "a text and itself",
            )


def _weights(config: Any) -> Iterator[Problem]:
    sources = config.data.sources
    weighted = [source.weight is not None for source in sources]
    if not any(weighted):
        return
    path: Path = ("data", "sources", weighted.index(True), "weight")
    if not all(weighted):
        missing = weighted.index(False)
        yield (
            ("data", "sources", missing, "weight"),
            f"sources.{missing} has no weight while sources.{path[2]} has one; weight all sources "
            "or none",
        )
    if config.data.docstrings is not None:
        yield path, "docstring sources have no weight; remove the weights or data.docstrings"
    if not config.data.stratified:
        yield path, "has no effect when data.stratified is false; remove one of the two"


def _row_length(config: Any) -> Iterator[Problem]:
    row = config.data.row_length
    for name in ("query_length", "document_length"):
        length = getattr(config.data, name)
        if row is not None and row < length:
            yield (
                ("data", "row_length"),
                f"a row of {row} tokens cannot hold data.{name} = {length}; raise row_length or "
                "leave it out",
            )


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


def _frozen(config: Any) -> Iterator[Problem]:
    optimizer = config.optimizer
    if optimizer.freeze_layers and not optimizer.freeze_embeddings:
        yield (
            ("optimizer", "freeze_embeddings"),
            "frozen layers stand on embeddings that would still move; set it true, or "
            "freeze_layers to 0",
        )


def _decay_steps(config: Any) -> Iterator[Problem]:
    schedule, decay = config.optimizer.schedule, config.optimizer.decay_steps
    if schedule == "wsd" and decay is None:
        yield (
            ("optimizer", "decay_steps"),
            "required by schedule wsd: the length of the final decay, in steps",
        )
    if schedule != "wsd" and decay is not None:
        yield (
            ("optimizer", "decay_steps"),
            f"only schedule wsd has decay_steps ({schedule} decays from warm-up to the end); "
            "remove it",
        )


def _final_fraction(config: Any) -> Iterator[Problem]:
    optimizer = config.optimizer
    if optimizer.schedule == "constant" and optimizer.final_fraction:
        yield (
            ("optimizer", "final_fraction"),
            "schedule constant ends at its peak; remove final_fraction or choose another schedule",
        )


def _warmup_fits(config: Any) -> Iterator[Problem]:
    total, warmup = config.train.total_steps, config.optimizer.warmup_steps
    if total is not None and warmup >= total:
        yield (
            ("optimizer", "warmup_steps"),
            f"a warm-up of {warmup} steps never ends in train.total_steps = {total}; lower it "
            "below that",
        )


def _decay_fits(config: Any) -> Iterator[Problem]:
    total, warmup = config.train.total_steps, config.optimizer.warmup_steps
    decay = config.optimizer.decay_steps
    if config.optimizer.schedule != "wsd" or decay is None or total is None or warmup >= total:
        return
    if warmup + decay > total:
        yield (
            ("optimizer", "decay_steps"),
            f"warm-up ({warmup}) and decay ({decay}) take {warmup + decay} steps, "
            f"train.total_steps is {total}",
        )


def _whole_share(config: Any) -> Iterator[Problem]:
    data, fsdp, batch = config.mesh.data, config.mesh.fsdp, config.train.global_batch
    devices = fsdp if data == "auto" else data * fsdp
    if batch % devices:
        named = f"mesh.fsdp = {fsdp}" if data == "auto" else f"mesh.data = {data}"
        if data != "auto" and fsdp > 1:
            named += f" x mesh.fsdp = {fsdp}"
        yield (
            ("train", "global_batch"),
            f"{batch} pairs cannot be shared equally by {named} devices; the next multiple is "
            f"{-(-batch // devices) * devices}",
        )


def _fused_attention(config: Any) -> Iterator[Problem]:
    wanted, precision = config.train.attention, config.train.precision
    if wanted in ("cudnn", "packed", "splash") and precision != "bfloat16":
        yield (
            ("train", "attention"),
            f"{wanted} computes in bfloat16, train.precision is {precision}; set one of the two "
            "otherwise (xla or auto)",
        )


def _ladder(config: Any) -> Iterator[Problem]:
    ladder = config.train.ladder
    if ladder == "auto" or not ladder:
        return
    if any(one >= other for one, other in itertools.pairwise(ladder)):
        yield ("train", "ladder"), "rungs must ascend; sort them and leave out repeated ones"
    if config.train.passes == "two":
        yield (
            ("train", "ladder"),
            "a rung keeps all activations, which train.passes: two rules out; remove one of the "
            "two",
        )


def _matryoshka_twice(config: Any) -> Iterator[Problem]:
    sizes = [one.size for one in config.loss.matryoshka]
    for index, size in enumerate(sizes):
        if size in sizes[:index]:
            yield ("loss", "matryoshka", index, "size"), f"{size} is listed twice; remove one"


def _equal_slices(config: Any) -> Iterator[Problem]:
    devices, slices = config.mesh.data, config.mesh.slices
    if "auto" not in (devices, slices) and devices % slices:
        yield (
            ("mesh", "slices"),
            f"mesh.data = {devices} devices cannot be cut into {slices} equal slices; take a "
            "divisor, or auto",
        )


def _task_names(config: Any) -> Iterator[Problem]:
    for index, task in enumerate(config.evaluation.tasks):
        kind, _, rest = task.partition(":")
        if task == "docstrings" or (kind == "beir" and rest):
            continue
        close = nearest(kind, ["docstrings", "beir"])
        meant = f"beir:{rest or 'FOLDER'}" if close == "beir" else close
        hint = f"; did you mean {meant}?" if meant else ""
        yield (
            ("evaluation", "tasks", index),
            f"got {task!r}, expected beir:FOLDER or docstrings{hint}",
        )


def _task_twice(config: Any) -> Iterator[Problem]:
    tasks = config.evaluation.tasks
    for index, task in enumerate(tasks):
        if task in tasks[:index]:
            yield ("evaluation", "tasks", index), f"{task!r} is listed twice; remove one"


def _nothing_to_score(config: Any) -> Iterator[Problem]:
    evaluation = config.evaluation
    for name, given in (
        ("every_steps", evaluation.every_steps is not None),
        ("demo_queries", bool(evaluation.demo_queries)),
    ):
        if given and not evaluation.tasks:
            yield (
                ("evaluation", name),
                "has no effect without evaluation.tasks; add a task or leave it out",
            )


def _docstrings_task(config: Any) -> Iterator[Problem]:
    tasks = config.evaluation.tasks
    if "docstrings" not in tasks:
        return
    path: Path = ("evaluation", "tasks", tasks.index("docstrings"))
    if config.data.docstrings is None:
        yield (
            path,
            "task docstrings needs data.docstrings with held_out packages; add them or remove the "
            "task",
        )
    elif not config.data.docstrings.held_out:
        yield (
            path,
            "task docstrings has nothing to score: data.docstrings.held_out is empty; name "
            "packages there or remove the task",
        )


def _packages(config: Any) -> Iterator[Problem]:
    docstrings = config.data.docstrings
    if docstrings is None or isinstance(docstrings.packages, str):
        return
    if not [name for name in docstrings.packages if name not in docstrings.held_out]:
        yield (
            ("data", "docstrings", "packages"),
            "no package is left to train on; name one that is not in held_out, or write installed",
        )


_RULES: tuple[Callable[[Any], Iterator[Problem]], ...] = (
    _one_start,
    _preset_tokenizer,
    _some_data,
    _unique_names,
    _columns_differ,
    _weights,
    _row_length,
    _hard_negatives,
    _parents,
    _one_origin_of_negatives,
    _thresholds,
    _curriculum,
    _distillation,
    _own_documents_only,
    _frozen,
    _decay_steps,
    _final_fraction,
    _warmup_fits,
    _decay_fits,
    _whole_share,
    _fused_attention,
    _ladder,
    _matryoshka_twice,
    _equal_slices,
    _task_names,
    _task_twice,
    _nothing_to_score,
    _docstrings_task,
    _packages,
)
