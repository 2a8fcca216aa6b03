"""What `arcticjax.evaluate` reported of an encoder, read again for its card."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arcticjax.config.contract import TextContract
from arcticjax.errors import CheckpointError, ConfigError
from arcticjax.export.card import Dataset, Evaluation, Score
from arcticjax.export.source import Source
from arcticjax.models.pretrained import read_json
from arcticjax.models.tokenizer import TextTokenizer

REPORT_FILE, RESULTS_FILE = "report.json", "results.json"


def fingerprints(source: Source) -> dict[str, Any]:
    """What tells an encoder from others, as plain JSON: its weights, tokenizer and contract."""
    return {
        "weights_sha256": source.sha256,
        "tokenizer_sha256": TextTokenizer.from_file(source.tokenizer_folder).sha256,
        "contract": source.contract.to_dict(),
    }


def read_evaluation(path: Path, source: Source) -> Evaluation:
    """What an evaluation found of `source`. path: the folder that it wrote, or its report.json or
    results.json.

    Raises ConfigError where there is none, or it is of another encoder than `source`, and
    CheckpointError where it is damaged.
    """
    file = path / REPORT_FILE if path.is_dir() else path
    if file.name == RESULTS_FILE:
        file = file.with_name(REPORT_FILE)  # which says whose the results are
    if not file.is_file():
        raise ConfigError(
            f"--results {path}: there is no {file}; name what python -m arcticjax.evaluate wrote "
            "(its --output)"
        )
    stored = read_json(file, required=True)
    if "encoder" not in stored:
        raise ConfigError(
            f"--results {file}: does not say which weights were scored; run the same evaluation "
            "again, which keeps its finished tasks"
        )
    try:
        encoder = stored["encoder"]
        contract = TextContract.from_dict(encoder["contract"])
        _check_same(file, encoder, contract, source)
        tasks = {name: _score(one) for name, one in stored["tasks"].items()}
        rows = {name: _score(one) for name, one in (stored["scores"] | stored["means"]).items()}
        return Evaluation(
            dimension=int(encoder["dimension"]),
            length=contract.document_length,
            precision=str(encoder["precision"]),
            tasks=tasks,
            rows=rows | {name: one for name, one in tasks.items() if name in rows},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"--results {file}: lacks or distorts {error}; run the same evaluation again"
        ) from None


def _check_same(
    file: Path, encoder: Mapping[str, Any], contract: TextContract, source: Source
) -> None:
    """That weights, tokenizer, prompts and pooling are those of `source`; lengths may differ."""
    ours = fingerprints(source)
    for name, what in (("weights_sha256", "weights"), ("tokenizer_sha256", "tokenizer")):
        if encoder[name] != ours[name]:
            raise ConfigError(
                f"--results {file}: are of another model: its {what} have SHA-256 {encoder[name]}, "
                f"those of {source.origin} {ours[name]}; evaluate {source.origin} itself, or "
                "convert what was scored"
            )
    lengths = {
        "query_length": contract.query_length,
        "document_length": contract.document_length,
    }
    if contract != dataclasses.replace(source.contract, **lengths):
        raise ConfigError(
            f"--results {file}: prompts or pooling are others than those of {source.origin}; "
            "evaluate it as it is converted"
        )


def _score(stored: Mapping[str, Any]) -> Score:
    dataset = stored.get("dataset")
    return Score(
        _numbers(stored["metrics"]),
        _numbers(stored["compressed"]),
        None if dataset is None else Dataset(**{key: str(value) for key, value in dataset.items()}),
    )


def _numbers(stored: Mapping[str, Any]) -> dict[str, float]:
    found = {name: float(value) for name, value in stored.items()}
    for name, value in found.items():
        if not math.isfinite(value):
            raise ValueError(f"{name!r}: {value}")
    return found
