"""Do mined negatives help? Mines, sweeps, fine-tunes in several ways, evaluates, writes a table.

python -m benchmarks.hard_negatives --sources A.parquet B.parquet --tasks beir:FOLDER --output DIR

Every source is a Parquet file with columns `query` and `document`. Some queries of each are held
out: they are searched among all documents of the source, and are trained on in no arm. The arms
differ in their negatives alone: in-batch only, mined ones below three shares of the positive's
score, and a curriculum from easy to hard; data, order of sources, steps, batch and learning rate
are the same. Stages run as a user types them, each in its own process. What is finished is not done
again: the same command goes on where it was stopped, and refuses another one's output.

With four sources and one task of some hundred documents the defaults take about forty minutes of
one CPU core: few pairs of a source, texts cut at 64 tokens, less than an epoch. A GPU has room for
--pairs 20000 --held-out 1000 --top-k 200 --negatives 7 --steps 1000 --batch 128
--document-length 256.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
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
        # Queries with fewer negatives get as many as they have; those with none are left out.
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
        "export": {"enabled": False},
        "report": {"plots": False},
    }


def stage(name: str, made: Path, *arguments: str) -> None:
    """Runs a stage as a user types it, unless the last file it makes is there."""
    if not made.exists():
        subprocess.run([sys.executable, "-m", f"arcticjax.{name}", *arguments], check=True)


def configured(name: str, made: Path, file: Path, content: dict[str, Any]) -> None:
    """Runs a stage on a config; see `stage`."""
    file.write_text(yaml.safe_dump(content))
    stage(name, made, "--config", str(file))


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
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
        "contract": {
            "query_length": options.query_length,
            "document_length": options.document_length,
        },
    }
    configured("mine", mined / "report" / "report.md", options.output / "mine.yaml", teacher)
    picture = mined / "report" / f"{sources[-1]['name']}-sweep.png"
    wanted = ("--output", str(mined), "--negatives", str(options.negatives))
    stage("mine", picture, "--sweep", *wanted)
    tasks = [*(source["task"] for source in sources), *options.tasks]
    yield {"arm": "before", **scores(options, tasks, options.model, "before"), "seconds": 0.0}
    for number, (name, arm) in enumerate(arms(options.negatives).items()):
        run = options.output / f"arm{number}"
        file = options.output / f"arm{number}.yaml"
        configured("train", run / "result.json", file, config(options, sources, arm, run))
        seconds = json.loads((run / "result.json").read_text())["seconds"]
        yield {"arm": name, **scores(options, tasks, str(run), run.name), "seconds": seconds}


def scores(
    options: argparse.Namespace, tasks: Sequence[str], model: str, name: str
) -> dict[str, float]:
    """nDCG@10 of every task, and their mean; texts are cut alike before and after training."""
    folder = options.output / "scores" / name
    length = str(max(options.query_length, options.document_length))
    stage(
        "evaluate", folder / "results.json", "--checkpoint", model, "--tasks", *tasks,
        "--output", str(folder), "--length", length,
    )  # fmt: skip
    results = json.loads((folder / "results.json").read_text())
    found = {task: results[task][METRIC] for task in map(task_name, tasks)}
    return {**found, "mean": float(np.mean(list(found.values())))}


def task_name(task: str) -> str:
    """What results call a task."""
    return Path(task.removeprefix("beir:")).name


def begin(options: argparse.Namespace) -> None:
    """Makes the output folder, or checks that it was begun by the same command."""
    given = json.loads(json.dumps(vars(options), default=str))
    del given["output"]
    file = options.output / "options.json"
    options.output.mkdir(parents=True, exist_ok=True)
    if file.exists() and json.loads(file.read_text()) != given:
        raise SystemExit(f"{file}: the folder was begun with other options; set another --output")
    file.write_text(json.dumps(given, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes it into the output folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path, nargs="+", required=True, metavar="PARQUET")
    parser.add_argument("--tasks", nargs="*", default=[], metavar="beir:FOLDER")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", default=MODEL, help="teacher and start")
    parser.add_argument("--pairs", type=int, default=500, help="of a source, at most")
    parser.add_argument(
        "--held-out", type=int, default=125, help="queries of a source, a quarter at most"
    )
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--negatives", type=int, default=2)
    parser.add_argument("--steps", type=int, default=56)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--query-length", type=int, default=32)
    parser.add_argument("--document-length", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    begin(options)
    rows: list[dict[str, Any]] = []
    for row in measure(options):
        rows.append(row)
        text = measuring.table(rows, dict.fromkeys(rows[0], ".4f") | {"arm": "", "seconds": ".0f"})
        print(f"\n{METRIC}\n{text}", flush=True)
        (options.output / "table.md").write_text(f"{text}\n")
        measuring.write_json(options.output / "table.json", rows)


if __name__ == "__main__":
    main()
