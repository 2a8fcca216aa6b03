"""One table of the training figures that `benchmarks/gpu.sh` left in a folder.

python -m benchmarks.gpu_table OUT

MFU is in model FLOPs (real tokens only, no recomputation) of what `benchmarks.ceiling` reached.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import measuring, train_throughput

SHOWN = (
    "shape", "batch", "precision", "side", "wall s/step", "pairs/s", "real tokens/s", "fill",
    "peak MiB", "times as fast", "loss differs",
)  # fmt: skip
COLUMNS = {
    "run": "",
    **{name: train_throughput.COLUMNS[name] for name in SHOWN},
    "model TFLOP/s": ".1f",
    "MFU": ".1%",
}


def rows(folder: Path) -> list[dict[str, Any]]:
    """A row for each side of each training measurement in the folder."""
    contents = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    ceiling = contents["ceiling"]["rows"][0]["TFLOP/s"] if "ceiling" in contents else None
    found = []
    for name, content in contents.items():
        for row in content["rows"]:
            if "times as fast" in row:
                rate = row.get("model TFLOP/s")
                mfu = rate / ceiling if rate and ceiling else None
                found.append({"run": name, **row, "MFU": mfu})
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    print(measuring.table(rows(options.folder), COLUMNS))


if __name__ == "__main__":
    main()
