"""Trains on a folder of Parquet sources and scores BEIR folders before and after.

python -m benchmarks.parquet_sources SOURCES --evaluate BEIR [BEIR ...] [--keep-layers 3] [--mixed]

SOURCES holds one file a source, with columns query and document. It starts from all-MiniLM-L6-v2,
mean pooling, 128 tokens. The defaults are those of the comparison in RESULTS.md: 150 batches of 64
in proportion to the sources' sizes, AdamW at 1e-4 with 10 warm-up steps and then down to zero,
temperature 0.05, no weight decay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import measuring

COLUMNS = {
    "task": "",
    "before": ".4f",
    "after": ".4f",
    "steps": "",
    "pairs/s": ".1f",
    "fill": ".1%",
    "training s": ".0f",
    "peak MiB": ",.0f",
}


def config(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The run that the command line describes."""
    files = sorted(options.sources.glob("*.parquet"))
    if not files:
        raise SystemExit(f"{options.sources} holds no *.parquet")
    chosen = [file for file in files if file.stem not in options.without]
    return {
        "run": {"directory": str(options.run or folder / "run")},
        "model": {
            "init": "sentence-transformers/all-MiniLM-L6-v2",
            "keep_layers": options.keep_layers,
        },
        "data": {
            "sources": [{"name": file.stem, "path": str(file.absolute())} for file in chosen],
            "query_length": 128,
            "document_length": 128,
            "stratified": not options.mixed,
        },
        "loss": {"temperature": 0.05},
        "optimizer": {
            "learning_rate": options.learning_rate,
            "warmup_steps": 10,
            "weight_decay": 0.0,
        },
        "train": {
            "total_steps": options.steps,
            "global_batch": options.batch,
            "passes": options.passes,
        },
        "checkpoint": {"save_every_steps": options.steps},
        "evaluation": {"tasks": [f"beir:{task.absolute()}" for task in options.evaluate]},
        "export": {"enabled": False},
    }


def main() -> None:
    """Runs the training command in its own process and prints a row for every task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", type=Path, help="folder of Parquet files")
    parser.add_argument("--without", nargs="+", default=[], help="sources to leave out")
    parser.add_argument("--evaluate", nargs="+", type=Path, required=True, help="BEIR folders")
    parser.add_argument("--keep-layers", type=int)
    parser.add_argument("--mixed", action="store_true", help="batches that mix all sources")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--passes", choices=["auto", "one", "two"], default="auto")
    parser.add_argument("--run", type=Path, help="keep the run there")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = config(options, folder)
        file = folder / "config.yaml"
        file.write_text(json.dumps(made))  # YAML reads JSON
        command = [sys.executable, "-m", "arcticjax.train", "--config", str(file)]
        subprocess.run(command, check=True)
        result = json.loads((Path(made["run"]["directory"]) / "result.json").read_text())
    before, after = (result["evaluations"][when] for when in ("before", "after"))
    rows = [
        {
            "task": task,
            "before": before[task]["ndcg_at_10"],
            "after": after[task]["ndcg_at_10"],
            "steps": result["steps"],
            "pairs/s": result["pairs_per_second"],
            "fill": result["fill"],
            "training s": result["pairs"] / result["pairs_per_second"],
            "peak MiB": result["peak_memory_bytes"] / 2**20,
        }
        for task in after
    ]
    print("\nnDCG@10\n" + measuring.table(rows, COLUMNS))
    measuring.write_json(options.json, rows)


if __name__ == "__main__":
    main()
