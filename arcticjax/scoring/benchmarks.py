"""Names of benchmarks, and the folding of MTEB's 26 English retrieval tasks to 15 scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from arcticjax.errors import ConfigError

CQADUPSTACK = tuple(
    f"CQADupstack{forum}Retrieval"
    for forum in (
        "Android",
        "English",
        "Gaming",
        "Gis",
        "Mathematica",
        "Physics",
        "Programmers",
        "Stats",
        "Tex",
        "Unix",
        "Webmasters",
        "Wordpress",
    )
)
# Score -> the tasks that it is the mean of.
RETRIEVAL_15: dict[str, tuple[str, ...]] = {
    "ArguAna": ("ArguAna",),
    "CQADupstackRetrieval": CQADUPSTACK,
    "ClimateFEVER": ("ClimateFEVER",),
    "DBPedia": ("DBPedia",),
    "FEVER": ("FEVER",),
    "FiQA2018": ("FiQA2018",),
    "HotpotQA": ("HotpotQA",),
    "MSMARCO": ("MSMARCO",),
    "NFCorpus": ("NFCorpus",),
    "NQ": ("NQ",),
    "QuoraRetrieval": ("QuoraRetrieval",),
    "SCIDOCS": ("SCIDOCS",),
    "SciFact": ("SciFact",),
    "TRECCOVID": ("TRECCOVID",),
    "Touche2020": ("Touche2020",),
}
NANO_BEIR = tuple(
    f"Nano{name}Retrieval"
    for name in (
        "ArguAna",
        "ClimateFever",
        "DBPedia",
        "FEVER",
        "FiQA2018",
        "HotpotQA",
        "MSMARCO",
        "NFCorpus",
        "NQ",
        "Quora",
        "SCIDOCS",
        "SciFact",
        "Touche2020",
    )
)
RETRIEVAL_15_NAME, NANO_BEIR_NAME = "mteb:retrieval-15", "nano-beir"
# The lengths of the published protocol, in tokens.
PUBLISHED_LENGTH = 512

Value = TypeVar("Value")


def expand(names: Sequence[str]) -> list[str]:
    """Single tasks, `mteb:NAME` and `beir:FOLDER`, of what a user asks for; each once.

    Raises ConfigError for what is neither nor the name of a benchmark.
    """
    tasks: list[str] = []
    for name in names:
        if name == RETRIEVAL_15_NAME:
            tasks += [f"mteb:{task}" for parts in RETRIEVAL_15.values() for task in parts]
        elif name == NANO_BEIR_NAME:
            tasks += [f"mteb:{task}" for task in NANO_BEIR]
        elif name == "mteb:CQADupstackRetrieval":
            tasks += [f"mteb:{task}" for task in CQADUPSTACK]
        elif name.partition(":")[0] in ("mteb", "beir") and name.partition(":")[2]:
            tasks.append(name)
        else:
            raise ConfigError(
                f"task {name!r}: expected mteb:NAME (a task of MTEB), {RETRIEVAL_15_NAME}, "
                f"{NANO_BEIR_NAME}, or beir:FOLDER (corpus.jsonl, queries.jsonl, qrels.tsv)"
            )
    return list(dict.fromkeys(tasks))


def folded(values: Mapping[str, Value]) -> dict[str, list[Value]]:
    """Score -> values of the tasks that make it up: the twelve CQADupstack forums are one score,
    if all are there; every other task is its own."""
    together = all(task in values for task in CQADUPSTACK)
    scores: dict[str, list[Value]] = {}
    for task, value in values.items():
        score = "CQADupstackRetrieval" if together and task in CQADUPSTACK else task
        scores.setdefault(score, []).append(value)
    return scores


def complete(scores: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Benchmarks of which every score is there, each with its scores."""
    present = set(scores)
    known = {"MTEB retrieval (15)": tuple(RETRIEVAL_15), "NanoBEIR (13)": NANO_BEIR}
    return {name: parts for name, parts in known.items() if present.issuperset(parts)}
