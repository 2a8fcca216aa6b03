"""Which implementation of attention is fastest on this device? Writes the table of `auto`.

python -m benchmarks.attention [--write] [--json OUT]

Forward and backward pass of one layer's attention on packed rows of several texts, for every
implementation that the device runs, in one compiled program each. Repeats are interleaved, A B A B,
and the median counts. `--write` puts the times into the package's table
(arcticjax/models/attention_times.json), replacing entries of the same device kind, head size, row
length and dtype; `train.attention: auto` then takes the fastest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arcticjax.models.attention import Implementation, attend
from arcticjax.models.attention_choice import IMPLEMENTATIONS, KEY, TABLE, refusal
from benchmarks import measuring

# Tokens of a microbatch: as many as training takes where train.microbatch is left out.
TOKENS = {"cpu": 2048}
TOKENS_ELSEWHERE = 16384
MEAN_TEXT = 80  # tokens: three texts in a row of 256, as packed real pairs have


def segments(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Rows full of texts of random lengths, int32 [R, S]."""
    random = np.random.default_rng(seed)
    starts_RS = random.random((rows, length)) < 1 / MEAN_TEXT
    return (1 + starts_RS.cumsum(1)).astype(np.int32)


def make(implementation: Implementation, *shape: int, dtype: str) -> Callable[[], Any]:
    """A compiled forward and backward pass on random arrays [R, S, H, K], which waits for its
    result."""
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, shape, jnp.dtype(dtype)) for key in keys]
    segments_RS = jnp.asarray(segments(*shape[:2]))

    @jax.jit
    def run(segments_RS, wanted, *arrays):
        mixed, pull = jax.vjp(lambda *some: attend(*some, segments_RS, implementation), *arrays)
        return mixed, pull(wanted)

    return lambda: jax.block_until_ready(run(segments_RS, *arrays))


def merge(before: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a table with new ones in the place of those of the same key, in order."""
    by_key = {tuple(entry[name] for name in KEY): entry for entry in [*before, *found]}
    return [by_key[key] for key in sorted(by_key)]


def main() -> None:
    """Measures, prints a line for each shape, and writes what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--row-lengths", type=int, nargs="+", default=[128, 256, 384, 512])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument(
        "--implementations", nargs="+", default=list(IMPLEMENTATIONS), choices=IMPLEMENTATIONS
    )
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--tokens", type=int, help="of a microbatch; left out: as training takes")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--write", action="store_true", help="into the package's table")
    parser.add_argument("--json", type=Path, help="also write what was measured here")
    options = parser.parse_args()
    device = jax.devices()[0]
    tokens = options.tokens or TOKENS.get(device.platform, TOKENS_ELSEWHERE)
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}, {tokens} tokens")
    found = []
    for dtype in options.dtypes:
        for head_size in options.head_sizes:
            for row_length in options.row_lengths:
                rows = max(1, tokens // row_length)
                shape: Any = {"dtype": dtype, "head_size": head_size, "row_length": row_length}
                programs = {
                    one: make(one, rows, row_length, options.heads, head_size, dtype=dtype)
                    for one in options.implementations
                    if refusal(one, platform=device.platform, **shape) is None
                }
                samples = measuring.interleave(programs, options.repeats, warm=2)
                times = {name: round(1000 * one.median("wall"), 4) for name, one in samples.items()}
                found.append(
                    {
                        "platform": device.platform,
                        "device_kind": device.device_kind,
                        **shape,
                        "milliseconds": times,
                        "rows": rows,
                        "heads": options.heads,
                        "jax": jax.__version__,
                    }
                )
                said = ", ".join(f"{name} {one:.3f} ms" for name, one in times.items())
                print(f"{dtype}, heads of {head_size}, rows of {row_length}: {said}", flush=True)
    measuring.write_json(options.json, found)
    if options.write:
        table = merge(json.loads(TABLE.read_text()), found)
        TABLE.write_text(json.dumps(table, indent=2) + "\n")
        print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
