"""A training step against sentence-transformers: the same weights, texts, batches and loss.

python -m benchmarks.train_throughput [--shapes 32/256 64/512] [--batches 64] [--json OUT]

Real texts of unequal length, the docstring pairs of configs/quickstart.yaml (--pairs: any Parquet
file with columns query and document); --dense joins them so that every text is cut at its limit.
Both sides work in processes of their own and take turns, a few steps each (A B A B ...); while one
works the other waits. `times as fast` is the median of the turns' ratios to the first side, in CPU
seconds (on a GPU in wall seconds). The losses of every step are compared: the proof that both do
the same work. sentence-transformers' loss runs in a plain loop; `cached` is its
CachedMultipleNegativesRankingLoss, which needs less memory, as `two passes` here does.

Commands that are given one --turnstile FILE prepare and compile side by side, and are timed one
after another.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measuring, models, texts

TEMPERATURE, LEARNING_RATE = 0.05, 2e-5
ARCTICJAX, TORCH = "arcticjax", "sentence-transformers"
SIDES = {
    ARCTICJAX: {"kind": "arcticjax", "passes": "one"},
    "arcticjax, two passes": {"kind": "arcticjax", "passes": "two"},
    TORCH: {"kind": "torch", "cached": 0},
    f"{TORCH}, cached": {"kind": "torch", "cached": 32},
}
COLUMNS = {
    "shape": "",
    "batch": "",
    "precision": "",
    "side": "",
    "cpu s/step": ".3f",
    "wall s/step": ".3f",
    "pairs/s": ".1f",
    "real tokens/s": ",.0f",
    "fill": ".1%",
    "peak MiB": ",.0f",
    "times as fast": ".2f",
    "spread": ".0%",
    "loss differs": ".0e",
}


class Worker:
    """One side, in its process."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.turns: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train_workers", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                # Pinned sides have one thread each.
                "TOKENIZERS_PARALLELISM": "false" if job["threads"] else "true",
                "HF_HUB_OFFLINE": "1",
            },
        )

    def train(self, start: int, stop: int) -> dict[str, Any]:
        """Trains on the batches start to stop - 1."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"start": start, "stop": stop}) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise SystemExit(f"a side ended with {process.wait()}; its last lines are above")

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate(timeout=60)


class Turnstile:
    """Lets one process through at a time, and only once all have prepared themselves."""

    def __init__(self, file: Path | None) -> None:
        self._file = None if file is None else file.open("w")

    def close(self) -> None:
        """Leaves for good."""
        if self._file is not None:
            self._file.close()

    def prepare(self) -> None:
        """Keeps others waiting, once nobody is inside."""
        self._take(fcntl.LOCK_SH)

    def enter(self) -> None:
        """Waits until all are prepared, and those that went first have left."""
        self._take(fcntl.LOCK_UN)
        self._take(fcntl.LOCK_EX)

    def leave(self) -> None:
        """Lets the next one in."""
        self._take(fcntl.LOCK_UN)

    def _take(self, kind: int) -> None:
        if self._file is not None:
            fcntl.flock(self._file, kind)


def measure(
    names: Sequence[str],
    job: dict[str, Any],
    turnstile: Turnstile,
    *,
    warm: int,
    turns: int,
    steps: int,
) -> list[dict[str, Any]]:
    """A row for each side, the first of `names` being what `times as fast` compares with."""
    workers = {name: Worker({**job, **SIDES[name]}) for name in names}
    try:
        for worker in workers.values():
            worker.train(0, 0)  # it answers once it has compiled
        turnstile.enter()
        first = {name: worker.train(0, warm) for name, worker in workers.items()}
        losses = {name: list(found["losses"]) for name, found in first.items()}
        for turn in range(turns):
            start = warm + turn * steps
            for name, worker in workers.items():
                found = worker.train(start, start + steps)
                worker.turns.append(found)
                losses[name] += found["losses"]
    finally:
        for worker in workers.values():
            worker.close()
        turnstile.leave()
    clock = "cpu" if job["device"] == "cpu" else "wall"
    reference = seconds(workers[names[0]], clock)
    rows = []
    for name, worker in workers.items():
        tokens = sum(turn["tokens"] for turn in worker.turns)
        slots = sum(turn["slots"] for turn in worker.turns)
        wall = statistics.median(seconds(worker, "wall")) / steps
        row = {
            "shape": f"{job['query_length']}/{job['document_length']}",
            "batch": job["batch"],
            "precision": job["precision"],
            "side": name,
            "cpu s/step": statistics.median(seconds(worker, "cpu")) / steps,
            "wall s/step": wall,
            "pairs/s": job["batch"] / wall,
            "real tokens/s": tokens / (steps * turns) / wall,
            "fill": tokens / slots,
            "peak MiB": max(turn["peak_bytes"] for turn in worker.turns) / 2**20,
            "times as fast": statistics.median(
                np.divide(reference, seconds(worker, clock)).tolist()
            ),
            "spread": max(seconds(worker, clock)) / min(seconds(worker, clock)) - 1,
            "loss differs": difference(losses[name], losses[names[0]]),
            "losses": losses[name],
        }
        if "model_flops" in worker.turns[0]:
            flops = statistics.median(turn["model_flops"] for turn in worker.turns)
            row["model TFLOP/s"] = flops / steps / wall / 1e12
            row["announced"] = worker.turns[0]["announced"]
        rows.append(row)
    return rows


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """`ratio_fp32`, `ratio_bf16`: how many times as fast as sentence-transformers `arcticjax` is.

    The least over all shapes and batches; nothing where both were not measured.
    """
    found: dict[str, list[float]] = {}
    paces = {(row["shape"], row["batch"], row["precision"], row["side"]): row for row in rows}
    for (shape, batch, precision, side), row in paces.items():
        other = paces.get((shape, batch, precision, TORCH))
        if side == ARCTICJAX and other is not None:
            found.setdefault("fp32" if precision == "float32" else "bf16", []).append(
                row["times as fast"] / other["times as fast"]
            )
    return {f"ratio_{precision}": min(several) for precision, several in found.items()}


def seconds(worker: Worker, clock: str) -> list[float]:
    """Seconds of each turn."""
    return [turn[clock] for turn in worker.turns]


def difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Largest difference of a step's loss, relative to the mean loss."""
    gap = np.abs(np.array(losses) - np.array(reference)).max()
    return float(gap / np.mean(reference))


def write_pairs(source: Path | None, folder: Path, *, most: int, dense: bool) -> Path:
    """Pairs without repeated queries or documents, which one side would mask and the other not;
    in random order, as Parquet."""
    pairs, _ = texts.pairs(source)
    if dense:
        pairs = [joined(pairs[first : first + 24]) for first in range(0, len(pairs), 24)]
    seen: set[str] = set()
    chosen = []
    for query, document in pairs:
        if query not in seen and document not in seen and len(chosen) < most:
            chosen.append((query, document))
            seen |= {query, document}
    file = folder / "pairs.parquet"
    texts.write(chosen, file)
    return file


def joined(group: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """One long pair of several."""
    queries, documents = zip(*group, strict=True)
    return " ".join(queries), " ".join(documents)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every combination that the arguments name, and prints one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, help="Parquet with columns query and document")
    parser.add_argument(
        "--model",
        default="sentence-transformers/all-MiniLM-L6-v2",
        help="a hub name, a folder, or xs, s, m, l: that size with random weights",
    )
    parser.add_argument("--shapes", nargs="+", default=["32/256", "64/512"])
    parser.add_argument("--batches", nargs="+", type=int, default=[64])
    parser.add_argument("--precisions", nargs="+", default=["float32"])
    parser.add_argument("--sides", nargs="+", default=[TORCH, ARCTICJAX], choices=SIDES)
    parser.add_argument("--dense", action="store_true", help="texts as long as their limit")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="cores of a side; 0: all")
    parser.add_argument("--turns", type=int, default=5, help="of each side")
    parser.add_argument("--steps", type=int, default=1, help="in a turn")
    parser.add_argument("--warm", type=int, default=2, help="steps before the first turn")
    parser.add_argument("--set", action="append", default=[], help="of the config, for arcticjax")
    parser.add_argument("--turnstile", type=Path, help="a file that such commands share")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args(arguments)
    print(measuring.describe(measuring.machine()))
    rows = []
    with (
        contextlib.closing(Turnstile(options.turnstile)) as turnstile,
        tempfile.TemporaryDirectory() as scratch,
    ):
        turnstile.prepare()
        folder = Path(scratch)
        steps = options.warm + options.turns * options.steps
        most = max(options.batches) * steps
        pairs = write_pairs(options.pairs, folder, most=most, dense=options.dense)
        model = models.folder(options.model, texts.documents(pairs)[0], folder)
        for shape, batch, precision in itertools.product(
            options.shapes, options.batches, options.precisions
        ):
            query, document = map(int, shape.split("/"))
            for name in options.sides:
                SIDES[name]["config"] = str(config_of(folder, name, options, pairs, model))
            job = {
                "pairs": str(pairs),
                "model": str(model),
                "batch": batch,
                "precision": precision,
                "query_length": query,
                "document_length": document,
                "temperature": TEMPERATURE,
                "learning_rate": LEARNING_RATE,
                "device": options.device,
                "threads": options.threads,
                "sets": [
                    f"data.query_length={query}",
                    f"data.document_length={document}",
                    f"train.global_batch={batch}",
                    f"train.precision={precision}",
                    *options.set,
                ],
            }
            turnstile.prepare()
            found = measure(
                options.sides,
                job,
                turnstile,
                warm=options.warm,
                turns=options.turns,
                steps=options.steps,
            )
            rows += found
            print(measuring.table(found, COLUMNS), flush=True)
    print()
    print(measuring.table(rows, COLUMNS))
    measuring.write_json(options.json, rows, **ratios(rows))


def config_of(
    folder: Path, side: str, options: argparse.Namespace, pairs: Path, model: Path
) -> Path:
    """A config for one side, what both sides share left to the command line."""
    config = {
        "run": {"directory": str(folder / "run")},
        "model": {"init": str(model)},
        "data": {
            "sources": [{"name": "pairs", "path": str(pairs)}],
            "cache": str(folder / "cache"),
        },
        "loss": {"temperature": TEMPERATURE},
        "optimizer": {
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "weight_decay": 0.0,
        },
        "train": {
            "global_batch": 2,
            "total_steps": 10**6,
            "passes": SIDES[side].get("passes", "one"),
        },
        "mesh": {"platform": options.device},
        "export": {"enabled": False},
    }
    file = folder / f"{SIDES[side].get('passes')}.yaml"
    file.write_text(json.dumps(config))  # YAML reads JSON
    return file


if __name__ == "__main__":
    main()
