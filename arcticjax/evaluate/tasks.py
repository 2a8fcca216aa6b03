"""The tasks that a user asks for, and what an encoder scores on one of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arcticjax.errors import ConfigError
from arcticjax.evaluate.records import Identity, Record
from arcticjax.scoring import beir, benchmarks, metrics
from arcticjax.scoring.compression import FULL, Compression
from arcticjax.scoring.retrieve import Ranking, evaluate_each
from arcticjax.step.embedder import Embedder

Encoded = Callable[[int], None]

# Keys of results.json that are no tasks.
RESERVED = ("model", "revision", "seconds")
# Characters of an English token, to tell how much of a text lies beyond the cut.
CHARACTERS_PER_TOKEN = 4.5


@dataclass
class Wanted:
    """A task to score. `folder` is what `beir:FOLDER` holds; `named` is MTEB's task, None where
    mteb is not installed. data: fingerprint of texts and judgements."""

    name: str
    data: str
    folder: beir.Task | None = None
    named: Any = field(default=None, repr=False)

    @property
    def dataset(self) -> dict[str, str] | None:
        """Where MTEB has the data; None for a local folder."""
        if self.folder is not None:
            return None
        from arcticjax.scoring import mteb_tasks

        return mteb_tasks.dataset(self.named)

    def size(self, length: int) -> tuple[int, float] | None:
        """Texts, and their characters up to `length` tokens; None if not known before loading."""
        most = length * CHARACTERS_PER_TOKEN
        if self.folder is not None:
            texts = [*self.folder.documents, *self.folder.queries]
            return len(texts), sum(min(len(text), most) for text in texts)
        from arcticjax.scoring import mteb_tasks

        found = mteb_tasks.size(self.named)
        if found is None:
            return None
        documents, queries, characters = found
        return documents + queries, min(characters, (documents + queries) * most)


def wanted(names: Sequence[str], made: Mapping[str, Path]) -> list[Wanted]:
    """The single tasks behind `names`, folders read and MTEB's names looked up.

    made: folders of tasks that a run made itself, by name. Raises ConfigError for a name that is
    unknown, used twice, or needs mteb where it is not installed, and DataError as `beir.load_task`.
    """
    found: dict[str, Wanted] = {}
    given: dict[str, str] = {}
    plain = [name for name in names if name not in made]
    for name in [*(name for name in names if name in made), *benchmarks.expand(plain)]:
        kind, _, rest = name.partition(":")
        if name in made:
            one = _folder(beir.load_task(made[name]), name)
        elif kind == "beir":
            task = beir.load_task(os.path.expanduser(rest))
            one = _folder(task, task.name)
        else:
            one = _named(rest)
        if one.name in RESERVED or one.name in found:
            why = f"as {given[one.name]} is" if one.name in found else "a name that is taken"
            raise ConfigError(
                f"task {name}: is called {one.name!r}, {why}; scores are reported by name: rename "
                "the folder, or leave one out"
            )
        found[one.name], given[one.name] = one, name
    if not found:
        raise ConfigError("no tasks: name some with --tasks, such as beir:FOLDER or mteb:NFCorpus")
    return list(found.values())


def has_mteb() -> bool:
    """Whether the extra `eval` is installed."""
    return importlib.util.find_spec("mteb") is not None


def score(
    task: Wanted,
    embedder: Embedder,
    identity: Identity,
    compressions: Sequence[Compression],
    encoded: Encoded,
    keep: Callable[[Any, Any], None],
) -> Record:
    """Scores one task, through MTEB where it is installed.

    compressions: begin with `FULL`. keep: given MTEB's result and the model's description.
    """
    began = time.monotonic()
    if task.named is None:
        assert task.folder is not None
        found = evaluate_each(
            task.folder,
            lambda texts, side: embedder.encode(texts, side, encoded=encoded),
            compressions,
            embedder.mesh,
        )
        return Record(
            identity,
            found[FULL].metrics,
            {"test/default": _by_query({c: e.ranked for c, e in found.items()}, task.folder.qrels)},
            len(task.folder.documents),
            len(found[FULL].ranked),
            time.monotonic() - began,
        )
    return _score_with_mteb(task, embedder, identity, compressions, encoded, keep, began)


def _score_with_mteb(
    task: Wanted,
    embedder: Embedder,
    identity: Identity,
    compressions: Sequence[Compression],
    encoded: Encoded,
    keep: Callable[[Any, Any], None],
    began: float,
) -> Record:
    import mteb

    from arcticjax.scoring import mteb_tasks
    from arcticjax.scoring.mteb_encoder import MtebEncoder

    encoder = MtebEncoder(
        embedder, f"arcticjax/{identity.revision[:12]}", compressions=compressions, encoded=encoded
    )
    mteb_tasks.load(task.named)
    # Our records tell what is done, for all processes alike: MTEB shall not answer from a cache.
    result = mteb.evaluate(
        encoder, task.named, cache=None, co2_tracker=False, show_progress_bar=False
    ).task_results[0]
    keep(result, encoder.mteb_model_meta)
    values, documents, queries = {}, 0, 0
    for (split, subset), rankings in encoder.rankings.items():
        qrels = mteb_tasks.judgements(task.named, split, subset)
        if task.named.ignore_identical_ids:
            rankings = {one: _others(ranking) for one, ranking in rankings.items()}
        values[f"{split}/{subset}"] = _by_query(rankings, qrels)
        documents += len(task.named.dataset[subset][split]["corpus"])
        queries += len(qrels)
    parts = [part for split in result.scores.values() for part in split]
    names = metrics.METRICS if values else ("main_score",)
    found = {name: sum(float(part[name]) for part in parts) / len(parts) for name in names}
    task.named.unload_data()
    return Record(identity, found, values, documents, queries, time.monotonic() - began)


def _by_query(
    rankings: Mapping[Compression, Ranking], qrels: Mapping[str, Mapping[str, int]]
) -> dict[str, list[float]]:
    """nDCG@10 of each query, by compression."""
    return {
        str(one): [
            round(values["ndcg_at_10"], 6)
            for values in metrics.score_queries(ranking, qrels).values()
        ]
        for one, ranking in rankings.items()
    }


def _others(ranking: Ranking) -> Ranking:
    """Without the document that has the query's own id."""
    return {
        query: [hit for hit in hits[: metrics.RECALL_DEPTH + 1] if hit[0] != query]
        for query, hits in ranking.items()
    }


def _folder(task: beir.Task, name: str) -> Wanted:
    task = dataclasses.replace(task, name=name)
    if not has_mteb():
        return Wanted(name, beir.fingerprint(task), folder=task)
    from arcticjax.scoring import mteb_tasks

    return Wanted(name, beir.fingerprint(task), task, mteb_tasks.folder_task(task))


def _named(name: str) -> Wanted:
    if not has_mteb():
        raise ConfigError(
            f"task mteb:{name}: needs mteb, which is not installed; install arcticjax[eval], or "
            "score a copy of the data with beir:FOLDER"
        )
    from arcticjax.scoring import mteb_tasks

    task = mteb_tasks.named_task(name)
    return Wanted(name, str(task.metadata.dataset["revision"]), named=task)
