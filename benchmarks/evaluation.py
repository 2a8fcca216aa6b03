"""nDCG@10 of one model on BEIR folders by three ways, and the time each takes.

python -m benchmarks.evaluation FOLDER... --json OUT

Ways: `flax` is MTEB with the Flax encoder; `export` is MTEB with sentence-transformers on the
folder that was exported from it; `plain` is sentence-transformers' encode on the published folder,
scored by pytrec_eval, with nothing of arcticjax. All cut texts at the model's own length. Loading
and compiling do not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measuring

MODEL = "sentence-transformers/all-MiniLM-L6-v2"

Score = Callable[[Any], float]


def by_mteb(encoder: Any) -> Score:
    """A call that scores a task by MTEB."""
    import mteb

    from arcticjax.scoring import mteb_tasks

    def score(task: Any) -> float:
        result = mteb.evaluate(
            encoder,
            mteb_tasks.folder_task(task),
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
        )
        return result.task_results[0].scores["test"][0]["ndcg_at_10"]

    return score


def flax(source: Any) -> Score:
    """Ours, its program compiled."""
    from arcticjax.export.source import make_embedder
    from arcticjax.scoring.mteb_encoder import MtebEncoder

    embedder = make_embedder(source)
    embedder.encode([""])
    return by_mteb(MtebEncoder(embedder))


def export(source: Any) -> Score:
    """Our export, read by sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    from arcticjax.export.folder import write_folder

    with tempfile.TemporaryDirectory() as scratch:
        folder = write_folder(
            Path(scratch) / "model",
            spec=source.spec,
            params=source.params,
            tokenizer_folder=source.tokenizer_folder,
            contract=source.contract,
        )
        return by_mteb(SentenceTransformer(str(folder), local_files_only=True))


def plain(folder: Path) -> Score:
    """The published folder, without us and without MTEB."""
    import pytrec_eval
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), local_files_only=True)

    def score(task: Any) -> float:
        def encode(texts: list[str]) -> np.ndarray:
            found: Any = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
            return np.asarray(found, np.float32)

        scores_QT = encode(task.queries) @ encode(task.documents).T
        run = {}
        for query, scores_T in zip(task.query_ids, scores_QT, strict=True):
            best = np.argsort(-scores_T, kind="stable")[:100]
            run[query] = {task.document_ids[i]: float(scores_T[i]) for i in best}
        found = pytrec_eval.RelevanceEvaluator(task.qrels, {"ndcg_cut.10"}).evaluate(run)
        return float(np.mean([one["ndcg_cut_10"] for one in found.values()]))

    return score


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--model", default=MODEL, help="a folder, or a name that resolves to one")
    parser.add_argument("--threads", type=int, default=0, help="threads; 0: each side's own way")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    measuring.pin(options.threads or None)
    from arcticjax.export.source import open_source
    from arcticjax.models.resolve import resolve
    from arcticjax.scoring import beir

    folder = resolve(options.model)
    source = open_source(folder)
    length = max(source.contract.query_length, source.contract.document_length)
    contract = dataclasses.replace(source.contract, query_length=length, document_length=length)
    source = dataclasses.replace(source, contract=contract)
    sides = {"flax": flax(source), "export": export(source), "plain": plain(folder)}
    rows = []
    for task in map(beir.load_task, options.folders):
        for side, score in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            row: dict[str, Any] = {"set": task.name, "side": side, "ndcg_at_10": score(task)}
            row["wall_seconds"] = time.perf_counter() - wall
            row["cpu_seconds"] = time.process_time() - cpu
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    print(measuring.describe(measuring.machine()))
    print(f"{options.model}, texts cut at {length} tokens")
    columns = {"set": "", "side": "", "ndcg_at_10": ".5f", "wall_seconds": ".1f"}
    print(measuring.table(rows, columns | {"cpu_seconds": ".1f"}))
    measuring.write_json(options.json, rows, model=options.model, length=length)


if __name__ == "__main__":
    main()
