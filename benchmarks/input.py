"""The input pipeline alone: reading, drawing, laying out, assembling; nothing is trained.

python -m benchmarks.input --json OUT

Pairs are written once as a stored source, in a scratch folder, and global batches are then built
on one thread as a training process builds them. Real pairs (the docstrings of
configs/quickstart.yaml, or --pairs FILE.parquet) are too few for large batches, so the store holds
each several times over, under ids of its own and shuffled; lengths are the real ones.

Columns: `draw` (which records, their lengths and ids), `layout` (dealing pairs to devices and
packing every device's texts), `read` (tokens from disk, in memory by then) and `assemble` (rows
filled) in percent of a batch's CPU-seconds; `sequences a second` of the layout alone, which every
process does for all devices; `pairs a second` of everything, for a process that feeds all
the devices (its share of reading and assembling is smaller where there are more processes); `fill`
is the share of token slots that hold text.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import measuring, texts

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
WIDTHS = {"hidden_size": 384, "intermediate_size": 1536}  # of xs: they decide the row length
STAGES = ("draw", "layout", "read")


class Repeated:
    """A tokenizer of made-up texts: text `3.17` has the tokens of text 17, and an id of its own."""

    def __init__(self, tokenizer: Any, known: list[str]) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.sha256 = hashlib.sha256(f"repeated {tokenizer.sha256}".encode()).hexdigest()
        self._tokens = tokenizer.encode(known)

    def encode(self, names: list[str]) -> list[np.ndarray]:
        """Token ids by name."""
        return [self._tokens[int(name.partition(".")[2])] for name in names]


def store(folder: Path, pairs: list[tuple[str, str]], count: int) -> Any:
    """A stored source of `count` pairs: `pairs` over and over, each time in another order."""
    from arcticjax.data import stored
    from arcticjax.models.resolve import resolve
    from arcticjax.models.tokenizer import TextTokenizer

    tokenizer: Any = Repeated(
        TextTokenizer.from_file(resolve(MODEL)), [text for pair in pairs for text in pair]
    )
    copies = range(-(-count // len(pairs)))
    orders = [np.random.default_rng(copy).permutation(len(pairs)) for copy in copies]
    places = [(copy, int(place)) for copy, order in enumerate(orders) for place in order][:count]
    named = ((f"{copy}.{2 * place}", f"{copy}.{2 * place + 1}") for copy, place in places)
    return stored.write_source(folder, "repeated", named, tokenizer, origin={})


class Clock:
    """CPU-seconds spent inside functions, by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)

    def timed(self, stage: str, function: Callable) -> Callable:
        """`function`, its time added to `stage`."""

        def call(*arguments: Any, **named: Any) -> Any:
            began = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[stage] += time.process_time() - began

        return call


def builder(
    source: Any, global_batch: int, devices: int, shape: tuple[int, int], most_tokens: int
) -> Any:
    """Batches of a process that feeds all devices; rows as training would choose them."""
    from arcticjax.data import assemble, catalog, draw, pipeline

    views = [catalog.SourceView("repeated", [source])]
    draws = draw.Draw([len(source)], global_batch, seed=0)
    query, document = (assemble.Template(101, np.zeros(0, int), 102, cap) for cap in shape)
    shapes = pipeline.choose_shapes(
        views,
        draws,
        query,
        document,
        devices=devices,
        row_length=None,
        rows=None,
        most_tokens=most_tokens,
        **WIDTHS,
    )
    return pipeline.BatchBuilder(views, draws, shapes, query, document, range(devices))


def measure(build: Any, repeats: int) -> dict[str, Any]:
    """One row: medians over the batches of steps 1..repeats, after step 0."""
    from arcticjax.data import catalog, draw, layout

    steps, filled = [], []
    for step in range(repeats + 1):
        clock = Clock()
        with (
            mock.patch.object(draw.Draw, "at", clock.timed("draw", draw.Draw.at)),
            mock.patch.object(
                catalog.SourceView, "_gather", clock.timed("draw", catalog.SourceView._gather)
            ),
            mock.patch.object(layout, "deal", clock.timed("layout", layout.deal)),
            mock.patch.object(layout, "place", clock.timed("layout", layout.place)),
            mock.patch.object(
                catalog.SourceView, "read", clock.timed("read", catalog.SourceView.read)
            ),
        ):
            wall, cpu = time.perf_counter(), time.process_time()
            host = build(step)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if step:
            steps.append({**clock.seconds, "cpu": cpu, "wall": wall})
        shapes = build.shapes
        rows = layout.round_up(host.rows, shapes.rows) * shapes.devices
        filled.append(host.arrays["lengths"].sum() / (rows * shapes.row_length))
    seconds = {key: float(np.median([one[key] for one in steps])) for key in steps[0]}
    shapes = build.shapes
    pairs = shapes.devices * shapes.pairs
    share = {stage: seconds[stage] / seconds["cpu"] for stage in STAGES}
    return {
        "shape": f"{shapes.query_length}/{shapes.document_length}",
        "batch": pairs,
        "devices": shapes.devices,
        "row_length": shapes.row_length,
        "rows": shapes.rows,
        "pairs_per_cpu_second": pairs / seconds["cpu"],
        "pairs_per_wall_second": pairs / seconds["wall"],
        "layout_sequences_per_cpu_second": 2 * pairs / seconds["layout"],
        **share,
        "assemble": 1 - sum(share.values()),
        "fill": float(np.mean(filled)),
        "milliseconds": 1000 * seconds["cpu"],
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="Parquet: query and document")
    parser.add_argument("--shapes", nargs="+", default=["32/256", "64/512"], metavar="Q/D")
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 16384], metavar="B")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8], metavar="N")
    parser.add_argument("--store", type=int, default=65536, help="pairs of the stored source")
    parser.add_argument(
        "--microbatch-tokens",
        type=int,
        default=2048,
        help="token slots of a microbatch at most; training takes 2048 on a CPU, 16384 elsewhere",
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed batches")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    measuring.pin(1)
    pairs, origin = texts.pairs(options.pairs)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        source = store(Path(scratch) / "store", pairs, max(options.store, *options.batches))
        print(f"stored {len(source)} pairs", file=sys.stderr, flush=True)
        for shape in options.shapes:
            query, document = map(int, shape.split("/"))
            for batch in options.batches:
                for devices in options.devices:
                    build = builder(
                        source, batch, devices, (query, document), options.microbatch_tokens
                    )
                    rows.append(measure(build, options.repeats))
    print(measuring.describe(measuring.machine()))
    print(f"{origin}, repeated; medians of {options.repeats} batches")
    columns = {
        "shape": "",
        "batch": "",
        "devices": "",
        "row_length": "",
        "rows": "",
        "pairs_per_cpu_second": ",.0f",
        "pairs_per_wall_second": ",.0f",
        "layout_sequences_per_cpu_second": ",.0f",
        "draw": ".0%",
        "layout": ".0%",
        "read": ".0%",
        "assemble": ".0%",
        "fill": ".1%",
    }
    print(measuring.table(rows, columns))
    measuring.write_json(options.json, rows, texts=origin)


if __name__ == "__main__":
    main()
