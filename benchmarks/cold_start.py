"""Seconds from the command to the first step and to the final model, in a fresh process.

python -m benchmarks.cold_start --json OUT

Sides, in turn, `--rounds` times each: `arcticjax` with an empty cache of compiled programs (what a
first run costs), `arcticjax cached` with the cache that the run before left (another run directory,
the same config: a later run, or one that resumes), and `peer`: a plain loop of
sentence-transformers' MultipleNegativesRankingLoss over the same pairs, batches of the same size,
as many steps, the same optimiser. All start from all-MiniLM-L6-v2, read the pairs from a Parquet
file and leave a sentence-transformers folder; ours also tokenises all pairs first and certifies
the folder in a process that imports torch. `--no-export` leaves the folder out on both sides.

`first step`: when its loss is written down. CPU-seconds include those of child processes.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks import measuring, texts

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
FIRST_STEP = "first_step"  # a file that the peer's loop leaves
LEARNING_RATE = 5e-5
TEMPERATURE = 0.05
_OWN_CACHE = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
_ROOT = Path(__file__).resolve().parent.parent


def config(options: argparse.Namespace, pairs: Path, run: Path, cache: Path) -> dict[str, Any]:
    """The config of our side: nothing is scored or drawn."""
    query, document = (int(cap) for cap in options.shape.split("/"))
    return {
        "run": {"directory": str(run), "compilation_cache": str(cache)},
        "model": {"init": options.model},
        "data": {
            "sources": [{"name": "pairs", "path": str(pairs)}],
            "query_length": query,
            "document_length": document,
        },
        "loss": {"temperature": TEMPERATURE},
        "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant"},
        "train": {"total_steps": options.steps, "global_batch": options.batch},
        "export": {"enabled": options.export},
        "report": {"plots": False},
        "checkpoint": {"save_every_steps": options.steps},
    }


def timed(command: list[str], first_step: Path) -> dict[str, float]:
    """Runs a command; seconds until the file `first_step` has content, and until its end."""
    # Ours must look where it is told, not where the shell says.
    environment = {name: value for name, value in os.environ.items() if name not in _OWN_CACHE}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    first = None
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, cwd=_ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            if first is None and first_step.is_file() and first_step.stat().st_size:
                first = time.monotonic() - began
            time.sleep(0.01)
        total = time.monotonic() - began
        if process.returncode or first is None:
            said.seek(0)
            sys.stderr.buffer.write(said.read())
            raise SystemExit(f"{' '.join(command)}: failed with exit code {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"first_step_seconds": first, "final_seconds": total, "cpu_seconds": cpu}


def measure(options: argparse.Namespace, pairs: Path, scratch: Path) -> list[dict[str, Any]]:
    """One row a side: medians over the rounds."""
    found: dict[str, list[dict[str, float]]] = {}
    for turn in range(options.rounds):
        cache = scratch / f"compiled{turn}"
        for side in ("arcticjax", "arcticjax cached"):
            run = scratch / f"{side.replace(' ', '-')}{turn}"
            file = scratch / f"{run.name}.yaml"
            file.write_text(yaml.safe_dump(config(options, pairs, run, cache)))
            command = [sys.executable, "-m", "arcticjax.train", "--config", str(file)]
            found.setdefault(side, []).append(timed(command, run / "metrics.jsonl"))
        if options.peer:
            folder = scratch / f"peer{turn}"
            command = [sys.executable, "-m", "benchmarks.cold_start", "--peer-loop", str(folder)]
            command += ["--pairs", str(pairs), "--steps", str(options.steps)]
            command += ["--batch", str(options.batch), "--shape", options.shape]
            command += ["--model", options.model] + ([] if options.export else ["--no-export"])
            found.setdefault("peer", []).append(timed(command, folder / FIRST_STEP))
    return [
        {
            "side": side,
            "steps": options.steps,
            "batch": options.batch,
            "shape": options.shape,
            **{key: statistics.median(one[key] for one in rounds) for key in rounds[0]},
        }
        for side, rounds in found.items()
    ]


def peer_loop(options: argparse.Namespace, folder: Path) -> None:
    """The peer's whole run, as its users write it without the trainer class (which needs two more
    packages)."""
    import torch
    from sentence_transformers import SentenceTransformer, util
    from sentence_transformers.sentence_transformer import losses

    from arcticjax.models.resolve import resolve

    folder.mkdir()
    pairs, _ = texts.pairs(options.pairs)
    model = SentenceTransformer(str(resolve(options.model)))
    caps = [int(cap) for cap in options.shape.split("/")]
    loss = losses.MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    model.train()
    for step in range(options.steps):
        start = step * options.batch % (len(pairs) - options.batch + 1)
        features = []
        for side, cap in enumerate(caps):
            model.max_seq_length = cap
            some = [pair[side] for pair in pairs[start : start + options.batch]]
            features.append(util.batch_to_device(model.preprocess(some), model.device))
        labels: Any = None
        value = loss(features, labels)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            (folder / FIRST_STEP).write_text(f"{value.item()}\n")
    if options.export:
        model.save(str(folder / "export"))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="Parquet: query and document")
    parser.add_argument("--count", type=int, default=2048, help="pairs")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16, help="pairs in a step")
    parser.add_argument("--shape", default="32/128", metavar="Q/D", help="caps in tokens")
    parser.add_argument("--model", default=MODEL, help="a folder, or a name that resolves to one")
    parser.add_argument("--no-export", dest="export", action="store_false")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="leave it out")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--threads", type=int, default=0, help="of each side; 0: its own way")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--peer-loop", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer_loop is not None:
        peer_loop(options, options.peer_loop)
        return
    measuring.pin(options.threads or None)
    pairs, origin = texts.pairs(options.pairs, options.count)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "pairs.parquet"
        texts.write(pairs, file)
        rows = measure(options, file, Path(scratch))
    print(measuring.describe(measuring.machine()))
    print(f"{options.model}, {origin}; medians of {options.rounds} rounds in turn")
    columns = {
        "side": "",
        "shape": "",
        "batch": "",
        "steps": "",
        "first_step_seconds": ".1f",
        "final_seconds": ".1f",
        "cpu_seconds": ".1f",
    }
    print(measuring.table(rows, columns))
    measuring.write_json(options.json, rows, texts=origin, export=options.export)


if __name__ == "__main__":
    main()
