"""Documents a second of the encoder against sentence-transformers, on the same weights and texts.

python -m benchmarks.encode --json OUT

Texts are the bodies of the docstrings that configs/quickstart.yaml trains on, or the column
`document` of --pairs FILE.parquet. Weights are all-MiniLM-L6-v2's (--model: any folder that both
read, or xs, s, m, l: that size with random weights). Each side gets plain text and gives float32
unit vectors; tokenising is part of it. Sides run in turn on pinned threads; compiling is in the
rounds that do not count. With --dtype bfloat16 our side computes as it does in a bfloat16 run,
theirs under autocast. `ratio` is their time over ours (above 1: we are faster; ratio_fp32 and
ratio_bf16 in the JSON are in CPU-seconds, on a GPU in wall seconds, at the last cap); `cosine` is
the lowest between both sides' vectors of one text; `fill` is the share of our token slots that hold
text; `model TFLOP/s` counts real tokens, tokenising and all in the time.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measuring, models, texts

MODEL = "sentence-transformers/all-MiniLM-L6-v2"

Encode = Callable[[], np.ndarray]


def arctic(folder: Path, documents: list[str], cap: int, dtype: str) -> tuple[Encode, float, float]:
    """A call that encodes all documents, the fill of its rows, and the FLOPs of the real tokens."""
    import jax.numpy as jnp

    from arcticjax.data import layout
    from arcticjax.export.source import open_source
    from arcticjax.models.encoder import Encoder
    from arcticjax.models.tokenizer import TextTokenizer
    from arcticjax.parallel import mesh as meshes
    from arcticjax.plan import costs
    from arcticjax.step.embedder import Embedder, templates

    source = open_source(folder)
    contract = dataclasses.replace(source.contract, query_length=cap, document_length=cap)
    tokenizer = TextTokenizer.from_file(source.tokenizer_folder)
    mesh = meshes.make_mesh()
    embedder = Embedder(
        Encoder(source.spec),
        meshes.replicate(mesh, source.params),
        tokenizer,
        contract,
        mesh,
        dtype=jnp.dtype(dtype),
    )
    shapes = embedder.shapes()
    own = np.array([len(ids) for ids in tokenizer.encode(documents)])
    lengths = templates(contract, tokenizer)["document"].lengths(own)
    length, block = shapes["row_length"], shapes["devices"] * shapes["rows"]
    used = layout.pack(lengths, length, length // layout.TOKENS_PER_SLOT)[3]
    slots = layout.round_up(used, block) * length
    tokens = float(lengths.sum())
    flops = costs.forward_flops(source.spec, tokens, float((lengths.astype(float) ** 2).sum()))
    return lambda: embedder.encode(documents), tokens / slots, flops


def sentence_transformers(folder: Path, documents: list[str], cap: int, dtype: str) -> Encode:
    """A call that encodes all documents, in batches of its default size; it sorts them by length
    itself."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder))
    model.max_seq_length = cap

    def encode() -> np.ndarray:
        narrow = dtype == "bfloat16"
        with torch.autocast(model.device.type, torch.bfloat16, enabled=narrow):
            found: Any = model.encode(documents, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, np.float32)

    return encode


def measure(
    folder: Path, documents: list[str], cap: int, dtype: str, repeats: int
) -> dict[str, Any]:
    """One row of the table."""
    ours, fill, flops = arctic(folder, documents, cap, dtype)
    theirs = sentence_transformers(folder, documents, cap, dtype)
    found = measuring.interleave({"arcticjax": ours, "peer": theirs}, repeats)
    cosines = np.sum(found["arcticjax"].value * found["peer"].value, axis=1, dtype=np.float64)
    row: dict[str, Any] = {
        "cap": cap,
        "dtype": dtype,
        "documents": len(documents),
        "fill": fill,
        "cosine": float(cosines.min()),
        "model TFLOP/s": flops / found["arcticjax"].median("wall") / 1e12,
    }
    for clock in ("cpu", "wall"):
        for side, samples in found.items():
            row[f"{side}_documents_per_{clock}_second"] = len(documents) / samples.median(clock)
        row[f"ratio_{clock}"] = measuring.ratio(found, "peer", "arcticjax", clock)
    return row


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="Parquet with column document")
    parser.add_argument("--count", type=int, default=1024, help="documents")
    parser.add_argument("--caps", type=int, nargs="+", default=[128, 256, 512], metavar="TOKENS")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--model", default=MODEL, help="a folder, or a name that resolves to one")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1, help="threads of a side; 0: its own way")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    measuring.pin(options.threads or None)
    # The two share a GPU: neither may take it all.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    chosen, origin = texts.documents(options.pairs, options.count)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = models.folder(options.model, chosen, Path(scratch))
        for cap in options.caps:
            rows.append(measure(folder, chosen, cap, options.dtype, options.repeats))
            print(f"cap {cap}: ratio {rows[-1]['ratio_wall']:.2f}", file=sys.stderr, flush=True)
    import jax

    clock = "wall" if jax.default_backend() == "gpu" else "cpu"
    print(measuring.describe(measuring.machine()))
    print(f"{options.model}, {origin}; medians of {options.repeats} rounds in turn")
    columns = {
        "cap": "",
        "dtype": "",
        "arcticjax_documents_per_cpu_second": ".1f",
        "peer_documents_per_cpu_second": ".1f",
        "ratio_cpu": ".2f",
        "arcticjax_documents_per_wall_second": ".1f",
        "peer_documents_per_wall_second": ".1f",
        "ratio_wall": ".2f",
        "fill": ".1%",
        "model TFLOP/s": ".3g",
        "cosine": ".7f",
    }
    print(measuring.table(rows, columns))
    name = "ratio_fp32" if options.dtype == "float32" else "ratio_bf16"
    ratios = {name: rows[-1][f"ratio_{clock}"]}
    measuring.write_json(options.json, rows, texts=origin, **ratios)


if __name__ == "__main__":
    main()
