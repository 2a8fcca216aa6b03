"""Tiny fine-tuning runs."""

from __future__ import annotations

from pathlib import Path

from tests import tiny
from tests.data import candidate_files


def config(folder: Path, **changes: object) -> Path:
    """Two sources of queries with negative columns; `changes` as in `tiny.run_config`."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for seed, name in enumerate("ab"):
        file = candidate_files.jsonl(
            folder / f"{name}.jsonl", candidate_files.records(seed, 48 - 8 * seed)
        )
        sources.append(
            {
                "name": name,
                "path": str(file),
                "document": "pos",
                "negatives": ["neg"],
                "scores": ["pos_scores", "neg_scores"],
            }
        )
    fields: dict[str, object] = {
        "data.sources": sources,
        "data.positives": 2,
        "data.negatives": {"count": 3},
        "loss.in_batch_negatives": False,
        "train.global_batch": 8,
        "train.total_steps": 6,
    }
    return tiny.run_config(folder, **{**fields, **changes})
