"""Retrieval evaluation on the training mesh: a run's tasks and the programs that score them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from arcticjax.errors import ConfigError
from arcticjax.scoring import beir, retrieve
from arcticjax.scoring.metrics import RECALL_DEPTH
from arcticjax.step.embedder import Embedder
from arcticjax.step.search import search, shapes


class Evaluator:
    """Scores the embedder's current parameters on fixed tasks; the same texts and shapes every
    time."""

    def __init__(self, tasks: Sequence[beir.Task], embedder: Embedder, mesh: Mesh) -> None:
        self.tasks = list(tasks)
        self._embedder = embedder
        self._mesh = mesh
        # Document vectors of the last evaluation by task (its identity: names are only labels), and
        # the parameters they are of.
        self._vectors: dict[int, np.ndarray] = {}
        self._of: object = None

    def evaluate(self) -> dict[str, dict[str, float]]:
        """{task: {"ndcg_at_10", "mrr_at_10", "recall_at_100"}} for the embedder's parameters as
        they are now."""
        return {task.name: self._one(task).metrics for task in self.tasks}

    def programs(self, demo_queries: int = 0, demo_top: int = 0) -> list[dict[str, Any]]:
        """What `evaluate` runs, and `best` for so many queries and answers: an entry of
        `compiled_shapes` for each program."""
        if not self.tasks:
            return []
        searches: list[tuple[dict[str, str], beir.Task, int, int]] = [
            ({}, task, sum(1 for query in task.query_ids if task.qrels.get(query)), RECALL_DEPTH)
            for task in self.tasks
        ]
        if demo_queries:
            searches.append(({"purpose": "demo"}, self.tasks[0], demo_queries, demo_top))
        devices = self._mesh.devices.size
        return [
            {"program": "encode", **self._embedder.shapes()},
            *(
                {
                    "program": "search",
                    **purpose,
                    "task": task.name,
                    **shapes(queries, len(task.documents), k, devices),
                }
                for purpose, task, queries, k in searches
            ),
        ]

    def prepare(self, demo_queries: int = 0, demo_top: int = 0) -> None:
        """Compiles `programs`, so that nothing is compiled once training has begun."""
        width = self._embedder.dimension
        for one in self.programs(demo_queries, demo_top):
            if one["program"] == "encode":
                self._embedder.encode([""], "query")
                continue
            search(
                np.zeros((one["queries"], width), np.float32),
                np.zeros((one["documents"], width), np.float32),
                one["top_k"],
                self._mesh,
            )

    def best(self, queries: Sequence[str], top: int) -> list[tuple[str, list[tuple[float, str]]]]:
        """The `top` documents of the first task for each query: (query, [(cosine, document)])."""
        documents = self.tasks[0].documents
        scores_Qk, indices_Qk = search(
            self._embedder.encode(list(queries), "query"),
            self._documents(self.tasks[0]),
            top,
            self._mesh,
        )
        return [
            (
                query,
                [
                    (float(score), documents[index])
                    for score, index in zip(scores, indices, strict=True)
                ],
            )
            for query, scores, indices in zip(queries, scores_Qk, indices_Qk, strict=True)
        ]

    def _documents(self, task: beir.Task) -> np.ndarray:
        """Document vectors of a task, embedded once for one set of parameters."""
        if self._of is not self._embedder.params:
            self._vectors, self._of = {}, self._embedder.params
        if id(task) not in self._vectors:
            self._vectors[id(task)] = self._embedder.encode(task.documents, "document")
        return self._vectors[id(task)]

    def _one(self, task: beir.Task) -> retrieve.Evaluation:
        return retrieve.evaluate(
            task,
            lambda texts, side: (
                self._documents(task) if side == "document" else self._embedder.encode(texts, side)
            ),
            lambda queries, documents, k: search(queries, documents, k, self._mesh),
        )


def load_tasks(names: Sequence[str], made: dict[str, Path]) -> list[beir.Task]:
    """Tasks by their names in a config: `beir:FOLDER`, or a name in `made` (folders that the run
    made itself).

    Raises DataError as `beir.load_task` does, and ConfigError where two tasks would be reported
    under one name.
    """
    tasks: dict[str, beir.Task] = {}
    given: dict[str, str] = {}
    for name in names:
        if name in made:
            task = dataclasses.replace(beir.load_task(made[name]), name=name)
        else:
            task = beir.load_task(os.path.expanduser(name.removeprefix("beir:")))
        if task.name in tasks:
            raise ConfigError(
                f"evaluation.tasks: {given[task.name]} and {name} are both called {task.name!r}, "
                "the last part of the path, by which scores are reported; rename one of the "
                "folders, or leave one out"
            )
        tasks[task.name], given[task.name] = task, name
    return list(tasks.values())
