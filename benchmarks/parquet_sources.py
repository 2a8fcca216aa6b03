"""Trains on a folder of Parquet sources and scores BEIR folders before and after.

python -m benchmarks.parquet_sources SOURCES --evaluate BEIR [BEIR ...] [--keep-layers 3] [--mixed]

SOURCES holds one file a source, with columns query and document. It starts from all-MiniLM-L6-v2,
mean pooling, 128 tokens. The defaults are those of the comparison in RESULTS.md: 150 batches of 64
in proportion to the sources' sizes, AdamW at 1e-4 with 10 warm-up steps and then down to zero,
temperature 0.05, no weight decay.

--peer trains in sentence-transformers instead: its MultipleNegativesRankingLoss in a plain loop, as
many batches drawn by the same rule, the same optimiser, its own encoding and the same scoring.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import measuring

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
TOKENS, WARM_UP, TEMPERATURE = 128, 10, 0.05
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
    return {
        "run": {"directory": str(options.run or folder / "run"), "seed": options.seed},
        "model": {"init": MODEL, "keep_layers": options.keep_layers},
        "data": {
            "sources": [
                {"name": file.stem, "path": str(file.absolute())} for file in chosen(options)
            ],
            "query_length": TOKENS,
            "document_length": TOKENS,
            "stratified": not options.mixed,
        },
        "loss": {"temperature": TEMPERATURE},
        "optimizer": {
            "learning_rate": options.learning_rate,
            "warmup_steps": WARM_UP,
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


def chosen(options: argparse.Namespace) -> list[Path]:
    """The files to train on."""
    files = sorted(options.sources.glob("*.parquet"))
    if not files:
        raise SystemExit(f"{options.sources} holds no *.parquet")
    return [file for file in files if file.stem not in options.without]


def peer(options: argparse.Namespace) -> dict[str, Any]:
    """Trains and scores in sentence-transformers; the fields of a run's result that are shown."""
    import pyarrow.parquet
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    from arcticjax.data.draw import Draw
    from arcticjax.models.resolve import resolve
    from arcticjax.scoring import beir, metrics

    torch.manual_seed(options.seed)
    model = SentenceTransformer(str(resolve(MODEL)), device="cpu")
    if options.keep_layers:
        encoder = model[0].auto_model.encoder
        encoder.layer = encoder.layer[: options.keep_layers]
    model.max_seq_length = TOKENS
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tables = [pyarrow.parquet.read_table(file) for file in chosen(options)]
    if options.mixed:
        tables = [pyarrow.concat_tables([one.select(["query", "document"]) for one in tables])]
    draw = Draw([len(one) for one in tables], options.batch, options.seed)
    tasks = [beir.load_task(folder) for folder in options.evaluate]

    def evaluate() -> dict[str, dict[str, float]]:
        model.eval()
        found = {}
        for task in tasks:
            queries, documents = (
                model.encode(texts, normalize_embeddings=True)
                for texts in (task.queries, task.documents)
            )
            ranked = {
                query: [
                    (task.document_ids[at], float(scores[at])) for at in (-scores).argsort()[:100]
                ]
                for query, scores in zip(task.query_ids, queries @ documents.T, strict=True)
            }
            found[task.name] = metrics.score(ranked, task.qrels)
        model.train()
        return found

    before = evaluate()
    loss = losses.MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(step / WARM_UP, (options.steps - step) / (options.steps - WARM_UP)),
    )
    tokens = slots = 0
    began = time.monotonic()
    for step in range(options.steps):
        drawn = draw.at(step)
        batch = tables[drawn.source].take(drawn.records)
        sides = [model.preprocess(batch[side].to_pylist()) for side in ("query", "document")]
        loss(sides, None).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += sum(int(side["attention_mask"].sum()) for side in sides)
        slots += sum(side["input_ids"].numel() for side in sides)
    seconds, pairs = time.monotonic() - began, options.steps * options.batch
    return {
        "evaluations": {"before": before, "after": evaluate()},
        "steps": options.steps,
        "pairs": pairs,
        "pairs_per_second": pairs / seconds,
        "fill": tokens / slots,
        "peak_memory_bytes": measuring.peak_resident(),
    }


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the training command in its own process; its result."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = config(options, folder)
        file = folder / "config.yaml"
        file.write_text(json.dumps(made))  # YAML reads JSON
        command = [sys.executable, "-m", "arcticjax.train", "--config", str(file)]
        subprocess.run(command, check=True)
        return json.loads((Path(made["run"]["directory"]) / "result.json").read_text())


def main() -> None:
    """Trains, and prints a row for every task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", type=Path, help="folder of Parquet files")
    parser.add_argument("--without", nargs="+", default=[], help="sources to leave out")
    parser.add_argument("--evaluate", nargs="+", type=Path, required=True, help="BEIR folders")
    parser.add_argument("--keep-layers", type=int)
    parser.add_argument("--mixed", action="store_true", help="batches that mix all sources")
    parser.add_argument("--peer", action="store_true", help="in sentence-transformers instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--passes", choices=["auto", "one", "two"], default="auto")
    parser.add_argument("--run", type=Path, help="keep the run there")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    result = peer(options) if options.peer else train(options)
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
