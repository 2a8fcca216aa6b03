"""The outcome of a training run: result.json, and its evaluations as a table."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from arcticjax.errors import CheckpointError, ResourceError
from arcticjax.train.json_lines import read_json_lines, write_atomically
from arcticjax.train.report import EVALUATIONS_FILE, as_number

RESULT_FILE = "result.json"
REMEDY = (
    "runs write it whole, so it was damaged or is not a run's; move it away, and the same command "
    "resumes from the last checkpoint and writes it again"
)
BEFORE, AFTER = "before", "after"
METRIC_TITLES = {
    "ndcg_at_10": "nDCG@10",
    "mrr_at_10": "MRR@10",
    "recall_at_100": "recall@100",
}
HEAD_FIELDS = ("step", "label", "task", "non_finite")

Evaluations = Mapping[str, Mapping[str, Mapping[str, float | None]]]


@dataclass(frozen=True)
class Result:
    """What scripts read of a run; exactly the keys of result.json.

    status: how the run ended, such as "done". steps, pairs: optimizer steps and pairs of the whole
    run, resumed parts included. seconds: wall time of training. Rates are per second over all
    devices; fill is real tokens / slots in [0, 1]. compiled_shapes: one object per program.
    peak_memory_bytes: of one device, or of the process where the device does not say.
    evaluations: "before" | "after" | step -> task -> metric -> value in [0, 1].
    export: folder of the exported model. nonfinite_steps: steps whose update was left out because
    it was not finite. loss_spikes: steps whose loss was far above those before. None is
    "not measured", or a number that was not finite.
    """

    status: str
    steps: int
    pairs: int
    seconds: float | None
    seconds_to_first_step: float | None
    pairs_per_second: float | None
    tokens_per_second: float | None
    fill: float | None
    compiled_shapes: list[dict[str, Any]]
    peak_memory_bytes: int | None
    evaluations: dict[str, dict[str, dict[str, float | None]]]
    export: str | None
    nonfinite_steps: int = 0
    loss_spikes: int = 0


def write_result(directory: Path, outcome: Result | None = None, **fields: Any) -> Path:
    """Writes RUN/result.json, all of it or nothing, from a `Result` or its fields.

    NumPy scalars, integer step labels and paths are accepted and written as JSON has them.
    Returns the file. Raises TypeError if a field is missing, unknown or of a wrong type,
    ResourceError if the file cannot be written.
    """
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(Result)
        if field.default is not dataclasses.MISSING
    }
    names = {field.name for field in dataclasses.fields(Result)}
    fields = defaults | (vars(outcome) if outcome else {}) | fields
    if fields.keys() != names:
        raise TypeError(
            f"result.json: missing {sorted(names - fields.keys())}, "
            f"unknown {sorted(fields.keys() - names)}"
        )
    fields = {name: _python(value) for name, value in fields.items()}
    if fields["export"] is not None:
        fields["export"] = str(fields["export"])
    if problem := _wrong_type(fields):
        raise TypeError(f"result.json: {problem}")
    path = directory / RESULT_FILE
    ordered = {field.name: fields[field.name] for field in dataclasses.fields(Result)}
    content = json.dumps(ordered, indent=2, allow_nan=False) + "\n"
    try:
        write_atomically(path, content.encode())
    except OSError as error:
        raise ResourceError(
            f"cannot write {path}: {error.strerror or error}; free disk space, "
            "then run the same command again"
        ) from error
    return path


def read_result(directory: Path) -> Result | None:
    """Reads RUN/result.json, or returns None if there is none, as before a run's end.

    Unknown keys, as a later version may write, are left out. Raises CheckpointError if the file is
    torn or not a run's result.
    """
    path = directory / RESULT_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}; {REMEDY}") from error
    if not isinstance(fields, dict):
        found = type(fields).__name__
        raise CheckpointError(f"{path}: expected a JSON object, got {found}; {REMEDY}")
    known = dataclasses.fields(Result)
    needed = [field.name for field in known if field.default is dataclasses.MISSING]
    if missing := [name for name in needed if name not in fields]:
        raise CheckpointError(
            f"{path}: not a run's result, it lacks {', '.join(missing)}; {REMEDY}"
        )
    if problem := _wrong_type(fields):
        raise CheckpointError(f"{path}: {problem}; {REMEDY}")
    return Result(**{one.name: fields[one.name] for one in known if one.name in fields})


def read_evaluation_records(directory: Path) -> list[dict[str, Any]]:
    """Reads RUN/evaluations.jsonl: `step`, `label` ("before" | "after" | step), `task`, metrics.

    File order; of several with the same step, label and task (a resumed run evaluates again) only
    the last. Lines that are no evaluation are left out; a missing file has none.
    """
    records, _ = read_json_lines(directory / EVALUATIONS_FILE)
    found = {
        (record["step"], str(record["label"]), record["task"]): record
        for record in records
        if isinstance(record.get("task"), str) and isinstance(record.get("label"), str | int)
    }
    return list(found.values())


def read_evaluations(directory: Path) -> dict[str, dict[str, dict[str, float | None]]]:
    """Reads RUN/evaluations.jsonl as `Result.evaluations`: label -> task -> metric -> value."""
    collected: dict[str, dict[str, dict[str, float | None]]] = {}
    for record in read_evaluation_records(directory):
        metrics = {k: as_number(v) for k, v in record.items() if k not in HEAD_FIELDS}
        collected.setdefault(str(record["label"]), {})[record["task"]] = metrics
    return collected


def before_after_table(evaluations: Evaluations) -> str:
    """Lays out task x metric with the values before and after training and their difference.

    A value that is missing is a dash. Without any evaluation before or after, says so.
    """
    before, after = evaluations.get(BEFORE, {}), evaluations.get(AFTER, {})
    rows = []
    for task in dict.fromkeys([*before, *after]):
        old, new = before.get(task, {}), after.get(task, {})
        for metric in _in_title_order({*old, *new}):
            a, b = old.get(metric), new.get(metric)
            gain = "-" if a is None or b is None else f"{b - a:+.4f}"
            title = METRIC_TITLES.get(metric, metric)
            rows.append((task, title, _four_places(a), _four_places(b), gain))
    if not rows:
        return "no evaluation before or after training"
    return text_table(("task", "metric", BEFORE, AFTER, "difference"), rows, left=2)


def source_table(means: Iterable[Mapping[str, Any]]) -> str:
    """Lays out what each source's last steps came to, from `Report.source_means`."""
    rows = [
        (one["source"], str(one["steps"]), _four_places(one["loss"]), _four_places(one["accuracy"]))
        for one in means
    ]
    return text_table(("source", "steps", "loss", "accuracy"), rows, left=1)


def text_table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> str:
    """Aligns cells in columns under a rule: the first `left` columns left, the others right.

    Wide characters count as the two columns a terminal gives them.
    """
    lines = [tuple(headers), *(tuple(row) for row in rows)]
    widths = [max(cell_len(cell) for cell in column) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(
            cell + pad if i < left else pad + cell
            for i, (cell, pad) in enumerate(
                (cell, " " * (width - cell_len(cell)))
                for cell, width in zip(line, widths, strict=True)
            )
        ).rstrip()
        for line in lines
    )


def _in_title_order(metrics: Iterable[str]) -> list[str]:
    known = list(METRIC_TITLES)
    return sorted(metrics, key=lambda m: (known.index(m) if m in known else len(known), m))


def _four_places(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _python(value: Any) -> Any:
    """Turns NumPy scalars into numbers, keys into text, and a non-finite number into None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _python(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_python(inner) for inner in value]
    return value


def _wrong_type(fields: Mapping[str, Any]) -> str | None:
    """Names the first field that is not of its declared type, or None if all are."""
    for field in dataclasses.fields(Result):
        value = fields[field.name]
        if field.name == "evaluations":
            if not _is_evaluations(value):
                return "evaluations: expected label -> task -> metric -> number"
            continue
        if field.name == "compiled_shapes":
            if not (isinstance(value, list) and all(isinstance(shape, dict) for shape in value)):
                return f"compiled_shapes: expected a list of objects, got {value!r}"
            continue
        kinds = {"str": (str,), "int": (int,), "float": (int, float)}[str(field.type).split(" ")[0]]
        if (value is None and "None" in str(field.type)) or (
            isinstance(value, kinds) and not isinstance(value, bool)
        ):
            continue
        return f"{field.name}: expected {field.type}, got {value!r}"
    return None


def _is_evaluations(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(tasks, dict)
        and all(
            isinstance(metrics, dict)
            and all(number is None or as_number(number) is not None for number in metrics.values())
            for metrics in tasks.values()
        )
        for tasks in value.values()
    )
