"""Retrieval tasks as MTEB has them: by name, and local folders wrapped. Needs the extra `eval`."""

from __future__ import annotations

from typing import Any

import mteb
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata

from arcticjax.errors import ConfigError, DataError
from arcticjax.scoring import beir

SPLIT, SUBSET = "test", "default"
# The published protocol scores MS MARCO on dev; its test judgements are those of TREC DL.
_SPLITS = {"MSMARCO": ["dev"]}


def named_task(name: str) -> Any:
    """MTEB's task of this name, its data not loaded yet.

    Raises ConfigError for an unknown name.
    """
    try:
        return mteb.get_task(name, eval_splits=_SPLITS.get(name))
    except KeyError as error:
        raise ConfigError(
            f"task mteb:{name}: {str(error.args[0]).removeprefix('KeyError: ')} "
            "Names are those of `mteb.get_tasks()`"
        ) from None


def folder_task(task: beir.Task) -> Any:
    """A task read from a folder as one of MTEB's, its data loaded."""

    class FolderTask(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=task.name,
            description="A retrieval task read from a local folder.",
            dataset={"path": task.name, "revision": beir.fingerprint(task)},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=[SPLIT],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, num_proc: int | None = None, **options: Any) -> None:
            # datasets is a dependency of mteb's.
            from datasets import Dataset

            split = RetrievalSplitData(
                corpus=Dataset.from_dict({"id": task.document_ids, "text": task.documents}),
                queries=Dataset.from_dict({"id": task.query_ids, "text": task.queries}),
                relevant_docs={query: dict(grades) for query, grades in task.qrels.items()},
                top_ranked=None,
            )
            self.dataset = {SUBSET: {SPLIT: split}}
            self.data_loaded = True

    made = FolderTask()
    made.load_data()
    return made


def load(task: Any) -> None:
    """Loads a task's data, from the hub or its local cache.

    Raises DataError with what to do where it cannot be had.
    """
    if task.data_loaded:
        return
    try:
        task.load_data()
    except (OSError, ValueError) as error:  # datasets' and the hub's errors are of these
        name = task.metadata.name
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"task mteb:{name}: its data cannot be loaded: {lines[0][:300]}. It comes from the "
            f"Hugging Face hub ({task.metadata.dataset['path']}) or its local cache: fetch it "
            "where there is a network, or score a copy with beir:FOLDER"
        ) from None


def judgements(task: Any, split: str, subset: str) -> dict[str, dict[str, int]]:
    """The qrels of a loaded task."""
    return task.dataset[subset][split]["relevant_docs"]


def dataset(task: Any) -> dict[str, str]:
    """What MTEB says of a task and of where its data are on the hub; split and config where the
    score is of one alone."""
    metadata, splits, subsets = task.metadata, task.eval_splits, task.hf_subsets
    return {
        "name": f"MTEB {metadata.name}",
        "task_type": metadata.type,
        "main_score": metadata.main_score,
        "path": metadata.dataset["path"],
        "revision": metadata.dataset["revision"],
        **({"split": splits[0]} if len(splits) == 1 else {}),
        **({"config": subsets[0]} if len(subsets) == 1 else {}),
    }


def size(task: Any) -> tuple[int, int, int] | None:
    """Documents, queries and characters of a task, by what MTEB ships of it; None if unknown."""
    statistics = task.metadata.descriptive_stats or {}
    found = [statistics[split] for split in task.eval_splits if split in statistics]
    if not found or "num_documents" not in found[0]:
        return None
    documents, queries, characters = (
        sum(one[field] for one in found)
        for field in ("num_documents", "num_queries", "number_of_characters")
    )
    return documents, queries, characters
