"""Small sources with hard negatives, in the forms that fine-tuning reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from arcticjax.data import candidates, record_files, stored
from tests import tiny


def records(seed: int, count: int, negatives: int = 6) -> list[dict]:
    """Queries with one or two positives and other queries' documents as negatives, scored; every
    third query repeats a positive of the one before."""
    random = np.random.default_rng(seed)
    pairs = tiny.pairs(seed, count)
    made = []
    for number, (query, document) in enumerate(pairs):
        positives = [document]
        if number % 3 == 2:
            positives.append(pairs[number - 1][1])
        others = [
            pairs[(number + 2 + step) % count][1]
            for step in random.permutation(count - 8)[:negatives].tolist()
        ]
        scores = np.sort(random.uniform(0.2, 0.9, negatives)).round(3)[::-1].tolist()
        made.append(
            {
                "query": query,
                "pos": positives,
                "neg": [one for one in others if one not in positives],
                "pos_scores": [0.9, 0.8][: len(positives)],
                "neg_scores": scores,
            }
        )
        made[-1]["neg_scores"] = scores[: len(made[-1]["neg"])]
    return made


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mined(folder: Path, sources: dict[str, list[tuple[str, str]]], depth: int = 20) -> Path:
    """A folder as mining leaves it: for each query of the sources random documents of all of them
    in a random order, with descending scores, and its positives."""
    random = np.random.default_rng(4)
    folder.mkdir(parents=True)
    every = [pair for pairs in sources.values() for pair in pairs]
    corpus = np.array(sorted({stored.text_id(document) for _, document in every}), np.uint64)
    positives: dict[int, set[int]] = {}
    for query, document in every:
        positives.setdefault(stored.text_id(query), set()).add(stored.text_id(document))
    lists, scores, known, known_scores = [], [], [], []
    for query in positives:
        others = [one for one in random.permutation(corpus).tolist() if one not in positives[query]]
        lists.append(np.array(others[:depth], np.uint64))
        scores.append(np.sort(random.uniform(-0.2, 0.9, len(lists[-1])))[::-1])
        known.append(np.array(sorted(positives[query]), np.uint64))
        known_scores.append(np.sort(random.uniform(0.5, 1.0, len(known[-1])))[::-1])

    def starts(rows):
        return np.cumsum([0, *map(len, rows)])

    part = candidates.Candidates(
        np.array(list(positives), np.uint64),
        np.concatenate(lists),
        np.concatenate(scores).astype(np.float32),
        starts(lists),
        np.concatenate(known),
        np.concatenate(known_scores).astype(np.float32),
        starts(known),
    )
    name = candidates.file_name("all", 0)
    candidates.write_shard(folder / name, part, "text")
    group = {
        "name": "all",
        "sources": list(sources),
        "kind": "text",
        "queries": len(positives),
        "documents": len(corpus),
        "sha256": "0" * 64,
        "files": [name],
    }
    manifest = {
        "format": candidates.FORMAT,
        "version": candidates.FORMAT_VERSION,
        "top_k": depth,
        "groups": [group],
        "files": {name: record_files.file_facts(folder / name)},
    }
    (folder / candidates.MANIFEST).write_text(json.dumps(manifest))
    return folder
