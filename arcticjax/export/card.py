"""The model card: what is known of an encoder, for people and for the Hugging Face hub.

What is not known is left out. Metadata follow the hub's model card specification; a result is in
the form that MTEB's cards have (100 times the metric).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from arcticjax.config import yaml_text
from arcticjax.config.contract import TextContract
from arcticjax.models.spec import ModelSpec

if TYPE_CHECKING:
    from arcticjax.export.certificate import Certificate

CARD_FILE = "README.md"
CURVES_FILE = "curves.png"
SOURCES_LISTED = 40

METRICS = {
    "ndcg_at_10": "nDCG@10",
    "mrr_at_10": "MRR@10",
    "recall_at_100": "recall@100",
    "main_score": "main score",
}

# The hub's names of licences; any other is `other` there, with its own name beside it.
# Source: https://huggingface.co/docs/hub/repositories-licenses
HUB_LICENCES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
    bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 intel-research isc lgpl lgpl-2.1 lgpl-3.0
    llama2 llama3 llama3.1 llama3.2 llama3.3 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1
    openrail openrail++ osl-3.0 pddl postgresql unknown unlicense wtfpl zlib
    """.split()
)
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")

Scores = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class DataSource:
    """A source that a run drew from: its pairs, own tokens of both sides, pairs drawn in training
    (None: not known apart from others), and what its config or manifest says of it."""

    name: str
    pairs: int | None = None
    query_tokens: int | None = None
    document_tokens: int | None = None
    drawn: int | None = None
    licence: str | None = None
    languages: tuple[str, ...] = ()
    dataset: str | None = None


@dataclass(frozen=True)
class Training:
    """What a run recorded, up to the step that was converted.

    steps, global_batch: optimizer steps and pairs in each. total_steps: of the whole run. config:
    fields that decide what was learned, by section. before, after: scores by task, at the start
    and at this step, in [0, 1]. curves: a PNG file of the whole run.
    """

    steps: int
    total_steps: int
    global_batch: int
    config: Mapping[str, Any]
    sources: Sequence[DataSource] = ()
    before: Scores | None = None
    after: Scores | None = None
    curves: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """MTEB's task and its data: `path` and `revision` on the hub, `split` and `config` where the
    score is of one alone. main_score: the metric that ranks models on it."""

    name: str
    task_type: str
    main_score: str
    path: str
    revision: str
    split: str | None = None
    config: str | None = None


@dataclass(frozen=True)
class Score:
    """What vectors score on a task, or on several folded into one: metrics by name, and nDCG@10 by
    compression (`float32@256`: the first 256 numbers of a vector)."""

    metrics: Mapping[str, float]
    compressed: Mapping[str, float] = field(default_factory=dict)
    dataset: Dataset | None = None


@dataclass(frozen=True)
class Evaluation:
    """What `arcticjax.evaluate` found of these weights.

    dimension: numbers of a vector whose score has no compression. length: tokens at which texts
    were cut. tasks: single tasks by name. rows: those as reported, some folded, with means.
    """

    dimension: int
    length: int
    precision: str
    tasks: Mapping[str, Score]
    rows: Mapping[str, Score]


@dataclass(frozen=True)
class Facts:
    """What is known of how an encoder came to be; None and empty where nothing is.

    base_model: its name on the hub. step: of the run called `name`. averaged: how, and of what.
    """

    name: str | None = None
    step: int | None = None
    base_model: str | None = None
    licence: str | None = None
    averaged: Sequence[str] = ()
    training: Training | None = None
    evaluation: Evaluation | None = None


def hub_id(name: str | None) -> str | None:
    """The `owner/model` of a hub name, without a revision; None for what cannot be one."""
    plain = (name or "").partition("@")[0]
    return plain if _HUB_ID.fullmatch(plain) else None


def write_card(
    folder: Path,
    spec: ModelSpec,
    contract: TextContract,
    certificate: Certificate,
    facts: Facts,
) -> None:
    """Writes README.md, and the curves it shows, into an exported folder."""
    training = facts.training
    if training is not None and training.curves is not None:
        shutil.copyfile(training.curves, folder / CURVES_FILE)
    text = card(spec, contract, certificate.dimension, facts, certificate)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def card(
    spec: ModelSpec,
    contract: TextContract,
    dimension: int,
    facts: Facts,
    certificate: Certificate | None = None,
) -> str:
    """The text of README.md. dimension: numbers of a vector as the folder gives it."""
    parts = [
        f"---\n{metadata(facts, dimension, spec.hidden_size).to_yaml()}\n---",
        f"# {facts.name or 'Text embedding model'}",
        _introduction(spec, dimension, facts),
        _usage(spec, contract, dimension),
    ]
    training = facts.training
    if facts.averaged:
        how, *averaged = facts.averaged
        listed = "\n".join(f"- {one}" for one in averaged)
        parts.append(f"## Weights\n\nThe weights are an average ({how}) of\n\n{listed}")
    if training is not None:
        parts += _training(training)
    parts += _results(facts, dimension, spec.hidden_size, certificate)
    if certificate is not None:
        parts.append(_certificate(certificate))
    return "\n\n".join(parts) + "\n"


def metadata(facts: Facts, dimension: int, width: int) -> ModelCardData:
    """The metadata block of the card, as the hub reads it, with scores of the vectors that the
    folder gives: `dimension` numbers of the encoder's `width`."""
    sources = facts.training.sources if facts.training else ()
    results = [
        _result(task, metric, value, dataset)
        for task, (metrics, dataset) in _scores(facts, dimension, width).items()
        for metric, value in metrics.items()
        if value is not None
    ]
    licence = facts.licence and facts.licence.lower()
    known = licence is None or licence in HUB_LICENCES
    fields: dict[str, Any] = {
        "language": _distinct(code for source in sources for code in source.languages) or None,
        "license": licence if known else "other",
        "license_name": None if known else facts.licence,
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "sentence-similarity"],
        "base_model": facts.base_model,
        "datasets": _distinct(source.dataset for source in sources if source.dataset) or None,
    }
    if results:
        fields |= {"model_name": facts.name or "model", "eval_results": results}
    return ModelCardData(**fields)


def _scores(
    facts: Facts, dimension: int, width: int
) -> dict[str, tuple[Mapping[str, float | None], Dataset | None]]:
    """Task -> scores of vectors of `dimension` numbers; those of a run are of whole ones."""
    found: dict[str, tuple[Mapping[str, float | None], Dataset | None]] = {}
    if facts.training is not None and dimension == width:
        found = {task: (scores, None) for task, scores in (facts.training.after or {}).items()}
    if facts.evaluation is not None:
        for task, score in facts.evaluation.tasks.items():
            cut = score.compressed.get(f"float32@{dimension}")
            if facts.evaluation.dimension == dimension:
                found[task] = (score.metrics, score.dataset)
            elif cut is not None:
                found[task] = ({"ndcg_at_10": cut}, score.dataset)
    return found


def _result(task: str, metric: str, value: float, dataset: Dataset | None) -> EvalResult:
    """One score as the hub and MTEB have it; a local task is its own data set."""
    shown = round(100 * value, 3)
    if dataset is None:
        return EvalResult("Retrieval", task, task, metric, shown)
    return EvalResult(
        task_type=dataset.task_type,
        dataset_type=dataset.path,
        dataset_name=dataset.name,
        dataset_config=dataset.config,
        dataset_split=dataset.split,
        dataset_revision=dataset.revision,
        metric_type=dataset.main_score if metric == "main_score" else metric,
        metric_value=shown,
    )


def _introduction(spec: ModelSpec, dimension: int, facts: Facts) -> str:
    made = "trained with arcticjax" if facts.training or facts.averaged else "written by arcticjax"
    start = f", starting from {facts.base_model}" if facts.training and facts.base_model else ""
    return (
        f"A {spec.family} encoder with {spec.num_layers} layers and "
        f"{spec.parameter_count():,} parameters that maps a text to a vector of {dimension} "
        f"numbers, {made}{start}."
    )


def _usage(spec: ModelSpec, contract: TextContract, dimension: int) -> str:
    longest = max(contract.query_length, contract.document_length)
    prompts = json.dumps(
        {"query": contract.query_prompt, "document": contract.document_prompt}, ensure_ascii=False
    )
    vectors = "unit length" if contract.normalize else "as pooled"
    note = ""
    if dimension < spec.hidden_size:
        vectors = f"the first {dimension} of {spec.hidden_size} numbers"
        note = f"""
Vectors are cut to {dimension} numbers (`truncate_dim`) after they were scaled to unit length, so \
they are shorter than 1. Compare them by cosine, or give `normalize_embeddings=True` to `encode_*`.
"""
    return f"""## Usage

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
queries = model.encode_query(["how do cranes sleep?"])
documents = model.encode_document(["Cranes sleep standing on one leg.", "A crane lifts loads."])
print(model.similarity(queries, documents))
```
{note}
| | |
|---|---|
| pooling | {contract.pooling} |
| vectors | {vectors}; compare by cosine |
| query length in training | {contract.query_length} tokens |
| document length in training | {contract.document_length} tokens |
| longest text | {longest} tokens (`max_seq_length`) |

Prompts, which `encode_query` and `encode_document` put before the text:

```json
{prompts}
```"""


def _training(training: Training) -> list[str]:
    steps = f"{training.steps:,} steps"
    if training.steps != training.total_steps:
        steps = f"{training.steps:,} of {training.total_steps:,} steps"
    parts = [
        f"## Training\n\n{steps} of {training.global_batch:,} pairs, "
        f"{training.steps * training.global_batch:,} pairs in all."
    ]
    if training.sources:
        parts.append(_sources(training.sources))
    if training.curves is not None:
        parts.append(f"![Loss per source, and scores of the whole run]({CURVES_FILE})")
    if training.config:
        parts.append(f"Config:\n\n```yaml\n{yaml_text.dump(dict(training.config)).strip()}\n```")
    return parts


def _sources(sources: Sequence[DataSource]) -> str:
    ordered = sorted(sources, key=lambda source: -(source.pairs or 0))
    rest = ordered[SOURCES_LISTED:]
    columns: dict[str, Callable[[DataSource], str]] = {
        "source": lambda one: one.name,
        "pairs": lambda one: _count(one.pairs),
        "tokens of queries": lambda one: _count(one.query_tokens),
        "tokens of documents": lambda one: _count(one.document_tokens),
        "pairs drawn": lambda one: _count(one.drawn),
        "dataset": lambda one: one.dataset or "",
        "licence": lambda one: one.licence or "",
        "language": lambda one: ", ".join(one.languages),
    }
    rows = [[show(source) for show in columns.values()] for source in ordered[:SOURCES_LISTED]]
    # What no source states has no column.
    kept = [column for column in range(len(columns)) if any(row[column] for row in rows)]
    table = _table(
        [list(columns)[column] for column in kept],
        [[row[column] for column in kept] for row in rows],
    )
    if rest:
        pairs = sum(one.pairs or 0 for one in rest)
        table += f"\n\nand {len(rest)} smaller sources with {pairs:,} pairs"
    return table


def _results(
    facts: Facts, dimension: int, width: int, certificate: Certificate | None
) -> list[str]:
    """Scores before training and at the step of the weights, and what an evaluation found."""
    parts = []
    if facts.training is not None and facts.training.after:
        table = _in_training(facts.training.before or {}, facts.training.after)
        whole = f"\n\nThey are of whole vectors of {width} numbers." if dimension < width else ""
        parts.append(f"In training:\n\n{table}{whole}")
    if facts.evaluation is not None:
        parts += _evaluated(facts.evaluation, dimension)
    if parts and certificate is not None and certificate.as_loaded_difference is not None:
        parts.append(f"All are of the weights before they were rounded to {certificate.dtype}.")
    return ["## Evaluation", *parts] if parts else []


def _in_training(before: Scores, after: Scores) -> str:
    shown = {task: scores for task, scores in before.items() if task in after}
    heads, rows = ["task"], []
    metrics = _metrics(after.values())
    for metric in metrics:
        title = METRICS.get(metric, metric)
        heads += [f"{title} before", title] if shown else [title]
    for task, scores in after.items():
        row = [task]
        for metric in metrics:
            row += [_score(shown.get(task, {}).get(metric))] if shown else []
            row.append(_score(scores.get(metric)))
        rows.append(row)
    return _table(heads, rows)


def _evaluated(evaluation: Evaluation, dimension: int) -> list[str]:
    """The scores of whole vectors, then of those cut or kept as integers, each under its name."""
    rows = evaluation.rows
    metrics = _metrics(score.metrics for score in rows.values())
    named = ["data"] if any(score.dataset for score in rows.values()) else []
    given = f"; this folder gives the first {dimension}" if dimension < evaluation.dimension else ""
    parts = [
        f"By `python -m arcticjax.evaluate`, of vectors of {evaluation.dimension} numbers{given}. "
        f"Texts were cut at {evaluation.length} tokens, and computed in {evaluation.precision}.",
        _table(
            ["task", *(METRICS.get(metric, metric) for metric in metrics), *named],
            [
                [
                    name,
                    *(_score(score.metrics.get(metric)) for metric in metrics),
                    *(score.dataset.path if score.dataset else "" for _ in named),
                ]
                for name, score in rows.items()
            ],
        ),
    ]
    kinds = _distinct(kind for score in rows.values() for kind in score.compressed)
    if len(kinds) > 1:
        parts += [
            "nDCG@10 of vectors kept as integers, or of their first numbers (`@`) alone:",
            _table(
                ["task", *kinds],
                [
                    [name, *(_score(score.compressed.get(kind)) for kind in kinds)]
                    for name, score in rows.items()
                    if score.compressed
                ],
            ),
        ]
    return parts


def _metrics(scores: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of metrics, known ones first."""
    known = list(METRICS)
    names = _distinct(name for one in scores for name in one)
    return sorted(names, key=lambda name: known.index(name) if name in METRICS else len(known))


def _certificate(certificate: Certificate) -> str:
    text = (
        f"## Certificate\n\n{len(certificate.probes)} texts were embedded by the encoder as "
        f"trained and from this folder by {certificate.reader}. In float32 no element of a vector "
        f"differs by more than {certificate.max_difference:.1e} (allowed: "
        f"{certificate.tolerance:.0e})."
    )
    if certificate.as_loaded_difference is not None:
        text += (
            f" The weights are stored in {certificate.dtype}; computed in it, vectors differ "
            f"from those of the encoder as trained by up to {certificate.as_loaded_difference:.1e} "
            f"(allowed: {certificate.as_loaded_tolerance:.0e})."
        )
    rows = [[name, f"{error:.1e}"] for name, error in certificate.probes.items()]
    notes = "".join(f"\n\n{note}" for note in certificate.notes)
    return f"{text}\n\n{_table(['text', 'largest difference'], rows)}{notes}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in line)} |"
        for line in lines
    )


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
