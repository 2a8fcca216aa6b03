"""What a run recorded, as facts for the model card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from yaml import YAMLError

from arcticjax.buckets import is_address
from arcticjax.config import load_config
from arcticjax.data.lineage import pairs_drawn
from arcticjax.errors import CheckpointError, ConfigError
from arcticjax.export.card import CARD_FILE, DataSource, Facts, Scores, Training, hub_id
from arcticjax.export.folder import OWN_FILE
from arcticjax.export.source import Source
from arcticjax.models.pretrained import read_json
from arcticjax.models.resolve import resolve

LINEAGE_FILE = "lineage.json"
CONFIG_FILE = "config.yaml"
EVALUATIONS_FILE = "evaluations.jsonl"
CURVES = "report/loss_and_ndcg.png"

# Sections that decide what is learned; of data, the sources have a table of their own.
_SECTIONS = ("model", "data", "loss", "optimizer", "train")
# Fields that name places on the machine of the run, or do not change what is learned.
_LEFT_OUT = {
    "model": ("init", "tokenizer"),
    "data": ("sources", "cache", "threads", "prefetch"),
    "train": ("log_every_steps",),
}
_NO_METRIC = ("step", "label", "task", "non_finite")


def facts_of(source: Source) -> Facts:
    """The facts of an opened encoder: those of its run, or the name that it has on the hub."""
    if source.run is not None and source.step is not None:
        return run_facts(source.run, source.step)
    if source.name is None:
        return Facts()
    folder, base = Path(source.name).expanduser(), base_model(source.name)
    name = folder.resolve().name if folder.exists() else base and base.partition("/")[2]
    return Facts(name=name, base_model=base)


def base_model(init: str | None) -> str | None:
    """The hub's name of what a run starts from: `init` itself, or what an earlier export's card
    says; None where neither is known."""
    if init is not None and is_address(init):
        folder = resolve(init)  # copied when it was loaded
    else:
        folder = Path(init or "").expanduser()
    if init is None or not folder.exists():
        return hub_id(init)
    if not (folder / OWN_FILE).is_file() or not (folder / CARD_FILE).is_file():
        return None
    try:
        stated = ModelCard((folder / CARD_FILE).read_text(encoding="utf-8")).data.get("base_model")
    except (ValueError, TypeError, YAMLError):
        return None  # edited until it is no card any more
    return hub_id(stated) if isinstance(stated, str) else None


def run_facts(run: Path, step: int) -> Facts:
    """The facts of a run's checkpoint at `step`; what the run has not recorded is left out.

    Raises CheckpointError for a damaged record.
    """
    lineage = read_json(run / LINEAGE_FILE, required=False)
    try:
        config = load_config(run / CONFIG_FILE) if (run / CONFIG_FILE).is_file() else None
    except ConfigError:
        config = None  # of another version: nothing that it says can be told from what it meant
    try:
        base = hub_id(lineage.get("base_model"))
        sources = _sources(lineage["data"], step) if "data" in lineage else ()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{run / LINEAGE_FILE}: lacks or distorts {error}; move it away to convert without "
            "what it says of the data"
        ) from None
    training = None
    if config is not None:
        sections = {
            name: {
                key: value
                for key, value in getattr(config, name).model_dump().items()
                if key not in _LEFT_OUT.get(name, ()) and value is not None
            }
            for name in _SECTIONS
        }
        scored = _evaluations(run / EVALUATIONS_FILE)
        curves = run / CURVES
        training = Training(
            steps=step,
            total_steps=lineage.get("total_steps") or config.train.total_steps or step,
            global_batch=config.train.global_batch,
            config=sections,
            sources=sources,
            before=scored.get(0),
            after=scored.get(step),
            curves=curves if curves.is_file() else None,
        )
    return Facts(
        name=run.resolve().name,
        step=step,
        base_model=base,
        licence=config.export.licence if config is not None else None,
        training=training,
    )


def average_facts(each: Sequence[Facts], how: str) -> Facts:
    """The facts of an average of encoders: what they are, and what all of them share."""
    bases = {facts.base_model for facts in each}
    licences = {facts.licence for facts in each}
    names = [
        f"{facts.name or 'a model'}" + (f" at step {facts.step}" if facts.step is not None else "")
        for facts in each
    ]
    return Facts(
        base_model=bases.pop() if len(bases) == 1 else None,
        licence=licences.pop() if len(licences) == 1 else None,
        averaged=(how, *names),
    )


def _sources(data: Mapping[str, Any], step: int) -> tuple[DataSource, ...]:
    found = []
    for view, drawn in zip(data["views"], pairs_drawn(data, step), strict=True):
        for part in view["parts"]:
            found.append(
                DataSource(
                    name=part["name"],
                    pairs=part.get("pairs"),
                    query_tokens=part.get("tokens", {}).get("query"),
                    document_tokens=part.get("tokens", {}).get("document"),
                    drawn=drawn if len(view["parts"]) == 1 else None,
                    licence=part.get("licence"),
                    languages=tuple(part.get("language", ())),
                    dataset=hub_id(part.get("dataset")),
                )
            )
    return tuple(found)


def _evaluations(file: Path) -> dict[int, Scores]:
    """Scores by step and task; of several for one step, the last. Torn lines are left out."""
    found: dict[int, dict[str, dict[str, float | None]]] = {}
    lines = file.read_text("utf-8", "replace").splitlines() if file.is_file() else []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("task"), str):
            scores = {
                name: float(value)
                for name, value in record.items()
                if name not in _NO_METRIC
                and isinstance(value, int | float)
                and math.isfinite(value)
            }
            found.setdefault(record.get("step", -1), {})[record["task"]] = dict(scores)
    return dict(found)
