"""Decisions about files that all processes of a run must take alike."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from arcticjax import errors
from arcticjax.parallel import distributed

_ROOT = "arcticjax/agreement"
# A process that is gone ends the others by itself: this only has to be short of for ever.
_POLL_MS = 600_000
# Told apart by their number: all processes do the same in the same order.
_numbers = itertools.count()


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


def everywhere(action: Callable[[], Any]) -> None:
    """Runs `action` on every process; all raise the error of the first that has one. A
    collective."""
    failure: Exception | None = None
    told = {}
    try:
        action()
    except Exception as error:
        failure = error
        told = {"error": type(error).__name__, "message": str(error)}
    answers = [json.loads(text) for text in gather_texts(json.dumps(told))]
    if failure is not None:
        raise failure
    for process, answer in enumerate(answers):
        if answer:
            kind = getattr(errors, answer["error"], RuntimeError)
            raise kind(f"process {process}: {answer['message']}")


def in_background(part: Callable[[], Any], join: Callable[[list[Any]], None]) -> None:
    """Runs `part` on every process, then `join` on process 0 with the JSON-able results of all; all
    raise where one did.

    It uses no device, so it may run beside collectives; all processes must call it in the same
    order.
    """
    if jax.process_count() == 1:
        return join([part()])
    client, rank = distributed.coordination_service(), jax.process_index()
    folder = f"{_ROOT}/{next(_numbers)}"
    failure: Exception | None = None
    try:
        told = {"result": part()}
    except Exception as error:
        failure, told = error, {"error": f"process {rank}: {error}"}
    client.key_value_set(f"{folder}/{rank}", json.dumps(told))
    if rank == 0:
        parts = [json.loads(_get(client, f"{folder}/{one}")) for one in range(jax.process_count())]
        answer = next((part["error"] for part in parts if "error" in part), "")
        if not answer:
            try:
                join([part["result"] for part in parts])
            except Exception as error:
                failure, answer = error, f"process 0: {error}"
        client.key_value_set(f"{folder}/answer", answer or "done")
    answer = _get(client, f"{folder}/answer")
    if failure is not None:
        raise failure
    if answer != "done":
        raise errors.StoreError(answer)
    return None


def _get(client: Any, key: str) -> str:
    while True:
        try:
            return client.blocking_key_value_get(key, _POLL_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
