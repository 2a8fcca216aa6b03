"""Exact search of mining against a sorted score matrix in NumPy, on random vectors.

python -m benchmarks.mine_search --documents 100000 --queries 2048 --json OUT

Vectors are whole numbers over 64, so that every product and sum is exact in float32: the two sides
must agree in every id and score, and thousands of scores are equal. Reading the vectors from disk
and writing the candidates are part of our time; NumPy has everything in memory, and a matrix of
512 queries x all documents. `scores_per_second` counts queries x documents.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from arcticjax.data import candidates
from arcticjax.mine.inputs import Pool
from arcticjax.mine.search import Search
from arcticjax.mine.vectors import Vectors
from arcticjax.parallel import mesh as meshes

BLOCK = 512


class Ids:
    """Texts of which only the ids matter."""

    def __init__(self, count: int) -> None:
        self.ids = np.arange(count, dtype=np.uint64)

    def __len__(self) -> int:
        return len(self.ids)


def vectors(count: int, width: int, seed: int) -> np.ndarray:
    """Whole numbers over 64, of about unit length at 384 numbers."""
    random = np.random.default_rng(seed)
    return (np.rint(random.normal(0, 3.27, (count, width))) / 64).astype(np.float32)


def reference(
    queries_QD: np.ndarray, documents_TD: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and places of the k best, from whole rows of scores and a stable sort."""
    scores, places = [], []
    for first in range(0, len(queries_QD), BLOCK):
        scores_QT = queries_QD[first : first + BLOCK] @ documents_TD.T
        order_QK = np.argsort(-scores_QT, axis=1, kind="stable")[:, :k]
        places.append(order_QK)
        scores.append(np.take_along_axis(scores_QT, order_QK, axis=1))
    return np.concatenate(scores), np.concatenate(places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--top-k", type=int, default=1000)
    parser.add_argument("--document-block", type=int, help="documents held at once; left out: all")
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args()
    total, count, width = options.documents, options.queries, options.dimension
    mesh = meshes.make_mesh()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides = {}
        for side, size, seed in (("query", count, 0), ("document", total, 1)):
            array = vectors(size, width, seed)
            kept = Vectors(folder, side, size, 8192, width)
            for shard in range(kept.shards):
                kept.write(shard, array[kept.places(shard)])
            sides[side] = array, kept
        pool = Pool(
            name="random",
            sources=("random",),
            kind="text",
            queries=Ids(count),
            documents=Ids(total),
            positives=np.zeros(0, np.int64),
            positive_starts=np.zeros(count + 1, np.int64),
            own_Q=np.full(count, -1),
            fingerprint="",
        )
        search = Search(
            pool=pool,
            queries=sides["query"][1],
            documents=sides["document"][1],
            output=folder,
            pieces=folder / "pieces",
            top_k=options.top_k,
            block=options.document_block or total,
            mesh=mesh,
        )
        began = time.perf_counter()
        with jax.set_mesh(mesh):
            for _ in search.run():
                pass
        ours = time.perf_counter() - began
        names = tuple(search.file(shard).name for shard in range(search.queries.shards))
        opened = candidates.CandidateFolder(folder, {"top_k": 0, "groups": [], "files": {}})
        found = opened.read(candidates.Group("random", (), "text", count, total, "", names))
    began = time.perf_counter()
    scores, places = reference(sides["query"][0], sides["document"][0], options.top_k)
    theirs = time.perf_counter() - began
    np.testing.assert_array_equal(found.candidate_ids.reshape(places.shape), places)
    np.testing.assert_array_equal(found.candidate_scores.reshape(scores.shape), scores)
    result = {
        "documents": total,
        "queries": count,
        "dimension": width,
        "top_k": options.top_k,
        "blocks": len(search.blocks),
        "devices": mesh.devices.size,
        "device": mesh.devices.flat[0].device_kind,
        "seconds": round(ours, 2),
        "numpy_seconds": round(theirs, 2),
        "scores_per_second": round(total * count / ours),
        "ties": int((np.diff(scores, axis=1) == 0).sum()),
        "equal": True,
    }
    print(json.dumps(result, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
