"""What all processes of a run must do alike, checked before anything depends on it.

A process that was started with another config, code or data would hang the others in a collective,
or train on other batches without a word. One process alone checks nothing.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np

from arcticjax.config import RunConfig
from arcticjax.data import pipeline
from arcticjax.parallel import fingerprint
from arcticjax.train.setup import Setup

# Fields in which processes may differ: where each finds its files and how it reads them.
_OWN = ("run.directory", "data.cache", "data.threads", "data.prefetch")
# Tokenising takes long, and not equally long everywhere.
_PREPARING_SECONDS = 6 * 3600.0


def check_start(config: RunConfig) -> None:
    """Config, code and devices; to come first after the processes joined."""

    def values() -> dict[str, Any]:
        fields = config.model_dump()
        for path in _OWN:
            section, name = path.split(".")
            del fields[section][name]
        devices = jax.local_devices()
        return {
            **fields,
            "code": fingerprint.code_version(),
            "devices": f"{len(devices)} x {devices[0].device_kind}",
        }

    fingerprint.check("at the start", values)


def check_prepared(ready: Setup) -> None:
    """Data, model and the shapes of the step; to come before the first program over all
    devices."""

    def values() -> dict[str, Any]:
        return {
            **ready.meta(),
            "shapes": vars(ready.shapes),
            "passes": ready.program.encoding.passes,
            "attention": ready.program.encoding.attention,
            "evaluation": {
                task.name: f"{len(task.queries)} queries, {len(task.documents)} documents"
                for task in ready.evaluator.tasks
            },
        }

    fingerprint.check("before training", values, patience_seconds=_PREPARING_SECONDS)


def check_resumed(start: int) -> None:
    """The step to go on from."""
    fingerprint.check("before training", lambda: {"resumed step": start})


def check_batch(host: pipeline.HostBatch) -> None:
    """The records of a batch, and which device has which; to come before its step."""

    def values() -> dict[str, Any]:
        records = host.drawn.records
        first = ", ".join(map(str, records[:4].tolist()))
        return {
            "step": host.step + 1,
            "source": host.source,
            "epoch": host.drawn.epoch,
            "records": f"{first}, ... ({len(records)}, sha256 {_hash(records)})",
            "layout": f"sha256 {_hash(*host.dealt.arrays())}",
        }

    fingerprint.check(f"before step {host.step + 1}", values)


def _hash(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, "<i8").tobytes())
    return digest.hexdigest()[:16]
