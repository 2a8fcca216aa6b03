"""A tiny mining run: its inputs, its config, the command, and what it left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from arcticjax.config import MineConfig, load
from arcticjax.mine import run
from arcticjax.scoring.beir import Task, write_task
from tests import tiny

ROOT = str(Path(__file__).resolve().parents[2])
TOP_K = 12


def inputs(folder: Path) -> None:
    """A teacher with prompts, a Parquet source, and a BEIR folder with repeated texts."""
    if (folder / "model").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tiny.model_folder(folder / "model")
    tiny.parquet(folder / "a.parquet", 0, 60)
    beir_folder(folder / "task")


def beir_folder(folder: Path) -> Path:
    """40 queries of one relevant document each, and beside them: a second document of the text of
    d3, a document of the text of query q5, a second query of the text of q7 with another relevant
    document, and a query without a relevant one."""
    made = tiny.pairs(9, 40)
    documents = {f"d{n:02d}": document for n, (_, document) in enumerate(made)}
    queries = {f"q{n:02d}": query for n, (query, _) in enumerate(made)}
    qrels = {f"q{n:02d}": {f"d{n:02d}": 1} for n in range(40)}
    documents |= {"c-copy": documents["d03"], "x-query": queries["q05"]}
    queries |= {"q-twin": queries["q07"], "q-none": "river stone"}
    qrels |= {"q-twin": {"d08": 2}, "q-none": {"d01": 0}}
    return write_task(
        folder,
        Task(
            folder.name,
            list(documents),
            list(documents.values()),
            list(queries),
            list(queries.values()),
            qrels,
        ),
    )


def config_file(folder: Path, **changes: object) -> Path:
    """The YAML file of a tiny run; `changes` replace fields of the first level."""
    inputs(folder)
    config = {
        "teacher": str(folder / "model"),
        "input": [
            {"name": "a", "path": str(folder / "a.parquet")},
            {"name": "task", "path": f"beir:{folder / 'task'}"},
        ],
        "output": str(folder / "out"),
        "cache": str(folder / "cache"),
        "top_k": TOP_K,
        "shard": 16,
        "contract": {"query_prompt": "river stone "},
        "mesh": {"data": 1},
        "report": {"negatives": 2, "queries": 30, "depth": 5, "examples": 3},
        **changes,
    }
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def config(folder: Path, **changes: object) -> MineConfig:
    return load(MineConfig, config_file(folder, **changes))


def mine(folder: Path, output: str, **changes: object) -> Path:
    """Mines in this process into a folder below `folder`."""
    return run.run(config(folder, output=str(folder / output), **changes))


def start(
    file: Path, *arguments: str, devices: int = 1, environment: dict[str, str] | None = None
) -> subprocess.Popen:
    """The command as a user types it, in its own process."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "arcticjax.mine", "--config", str(file), *arguments],
        env={**os.environ, "PYTHONPATH": ROOT, "XLA_FLAGS": flags, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def files(folder: Path) -> dict[str, bytes]:
    """The contract's files, by name."""
    found = [*folder.glob("candidates-*.parquet"), folder / "manifest.json"]
    return {path.name: path.read_bytes() for path in found}
