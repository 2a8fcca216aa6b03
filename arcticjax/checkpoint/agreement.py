"""Decisions about files that all processes of a run must take alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from arcticjax import errors


def gather_texts(text: str) -> list[str]:
    """Every process's text in process order; a collective: all processes must call it together."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([data.size], np.int32)))
    sizes = sizes.reshape(-1)
    padded = np.zeros([max(1, int(sizes.max()))], np.uint8)
    padded[: data.size] = data
    gathered = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [
        row[:size].astype(np.uint8).tobytes().decode()
        for row, size in zip(gathered, sizes, strict=True)
    ]


def from_primary(action: Callable[[], Any]) -> Any:
    """Runs `action` on process 0; all processes get its JSON-able result or raise its error.

    A collective. Only errors of `arcticjax.errors` cross to the other processes with their type;
    any other is raised on process 0 and becomes a RuntimeError elsewhere.
    """
    if jax.process_count() == 1:
        return action()
    answer: dict[str, Any] = {}
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            answer = {"result": action()}
        except Exception as error:
            failure = error
            answer = {"error": type(error).__name__, "message": str(error)}
    answer = json.loads(gather_texts(json.dumps(answer))[0])
    if failure is not None:
        raise failure
    if "error" in answer:
        raise getattr(errors, answer["error"], RuntimeError)(answer["message"])
    return answer["result"]
