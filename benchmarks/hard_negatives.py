"""Do mined negatives help? Mines, sweeps, fine-tunes in several ways, evaluates, writes a table.

python -m benchmarks.hard_negatives --sources A.parquet B.parquet --tasks beir:FOLDER --output DIR

Every source is a Parquet file with columns `query` and `document`. Some queries of each are held
out: they are searched among all documents of the source, and are trained on in no arm. The arms
differ in their negatives alone: in-batch only, mined ones below three shares of the positive's
score, and a curriculum from easy to hard; data, order of sources, steps, batch and learning rate
are the same. Stages run as a user types them, each in its own process; the same command goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from pyarrow import parquet

from arcticjax.scoring.beir import Task, write_task
from benchmarks import measuring

METRIC = "ndcg_at_10"
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
SHARES = (0.85, 0.95, 1.0)


def split(file: Path, most: int, held_out: int, seed: int, folder: Path) -> dict[str, Any]:
    """Writes the training pairs of a source and its held-out queries as a BEIR folder; where both
    lie. Pairs of a held-out query are never trained on; their documents may be."""
    table = parquet.read_table(file, columns=["query", "document"]).to_pylist()
    random = np.random.default_rng(seed)
    chosen = [table[place] for place in random.permutation(len(table))[:most].tolist()]
    queries = list(dict.fromkeys(pair["query"] for pair in chosen))
    out = set(queries[: min(held_out, len(queries) // 4)])
    documents = {pair["document"]: f"d{n}" for n, pair in enumerate(chosen)}
    names = {query: f"q{n}" for n, query in enumerate(sorted(out))}
    qrels: dict[str, dict[str, int]] = {}
    for pair in chosen:
        if pair["query"] in out:
            qrels.setdefault(names[pair["query"]], {})[documents[pair["document"]]] = 1
    task = folder / f"{file.stem}_held_out"
    pairs = folder / f"{file.stem}.parquet"
    if not task.exists():
        kept = [pair for pair in chosen if pair["query"] not in out]
        pairs.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(kept), pairs)
        write_task(
            task,
            Task(
                task.name,
                list(documents.values()),
                list(documents),
                list(names.values()),
                list(names),
                qrels,
            ),
        )
    return {"name": file.stem, "path": str(pairs), "task": f"beir:{task}"}


def arms(count: int) -> dict[str, dict[str, Any]]:
    """What each arm changes in the config: fields of `data` and of `loss`."""

    def mined(share: float, **more: Any) -> dict[str, Any]:
        upper = {"kind": "percent", "value": share, "of": "lowest"}
        # The same queries in every arm: those with fewer negatives get as many as they have.
        negatives = {"count": count, "minimum": 1, "thresholds": {"upper": upper}, **more}
        return {"data": {"negatives": negatives}, "loss": {"in_batch_negatives": True}}

    points = [{"start": place / 3, "upper": share} for place, share in enumerate(SHARES)]
    return {
        "in-batch only": {"data": {"negatives": {"count": 0}}, "loss": {}},
        **{f"mined, below {share:g} of the positive": mined(share) for share in SHARES},
        "mined, curriculum": mined(SHARES[-1], curriculum={"points": points}),
    }


def config(
    options: argparse.Namespace, sources: Sequence[dict[str, Any]], arm: dict[str, Any], run: Path
) -> dict[str, Any]:
    """A training run of one arm."""
    return {
        "run": {"directory": str(run), "seed": options.seed},
        "model": {"init": options.model},
        "data": {
            "sources": [
                {
                    "name": source["name"],
                    "path": source["path"],
                    "candidates": str(options.output / "mined"),
                }
                for source in sources
            ],
            "query_length": options.query_length,
            "document_length": options.document_length,
            "cache": str(options.output / "cache"),
            "small_sources": "merge",
            **arm["data"],
        },
        "loss": {"temperature": 0.05, **arm["loss"]},
        "optimizer": {"learning_rate": options.learning_rate, "warmup_steps": options.steps // 10},
        "train": {"total_steps": options.steps, "global_batch": options.batch},
        "evaluation": {"tasks": [*(source["task"] for source in sources), *options.tasks]},
        "export": {"enabled": False},
        "report": {"plots": False},
    }


def stage(name: str, file: Path, content: dict[str, Any]) -> None:
    """Runs a stage on a config, as a user types it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content))
    subprocess.run([sys.executable, "-m", f"arcticjax.{name}", "--config", str(file)], check=True)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row an arm: nDCG@10 of every task, and their mean; the first row is before training."""
    sources = [
        split(file, options.pairs, options.held_out, options.seed, options.output / "sources")
        for file in options.sources
    ]
    mined = options.output / "mined"
    teacher = {
        "teacher": options.model,
        "input": [{"name": one["name"], "path": one["path"]} for one in sources],
        "output": str(mined),
        "top_k": options.top_k,
    }
    stage("mine", options.output / "mine.yaml", teacher)
    sweep = ["--sweep", "--output", str(mined), "--negatives", str(options.negatives)]
    subprocess.run([sys.executable, "-m", "arcticjax.mine", *sweep], check=True)
    rows: list[dict[str, Any]] = []
    for number, (name, arm) in enumerate(arms(options.negatives).items()):
        run = options.output / f"arm{number}"
        stage("train", options.output / f"arm{number}.yaml", config(options, sources, arm, run))
        result = json.loads((run / "result.json").read_text())
        scored = result["evaluations"]
        if not rows:
            rows.append({"arm": "before", **_row(scored["before"])})
        rows.append({"arm": name, **_row(scored["after"]), "seconds": result["seconds"]})
    return rows


def _row(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    found = {task: values[METRIC] for task, values in scores.items()}
    return {**found, "mean": float(np.mean(list(found.values())))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes it into the output folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path, nargs="+", required=True, metavar="PARQUET")
    parser.add_argument("--tasks", nargs="*", default=[], metavar="beir:FOLDER")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", default=MODEL, help="teacher and start")
    parser.add_argument("--pairs", type=int, default=3000, help="of a source, at most")
    parser.add_argument("--held-out", type=int, default=200, help="queries of a source")
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--negatives", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--query-length", type=int, default=32)
    parser.add_argument("--document-length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rows = measure(options)
    columns = {name: ".4f" for name in rows[0] if name != "arm"}
    text = measuring.table(rows, {"arm": "", **columns})
    print(f"\n{METRIC}\n{text}")
    (options.output / "table.md").write_text(f"{text}\n")
    measuring.write_json(options.output / "table.json", rows)


if __name__ == "__main__":
    main()
