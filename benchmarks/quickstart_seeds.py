"""Does the quickstart's gain stand out from seed noise? Runs it once per seed and prints a table.

python -m benchmarks.quickstart_seeds --seeds 0 1 2 --json OUT
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = "configs/quickstart.yaml"
METRIC = "ndcg_at_10"


def main() -> None:
    """Runs the seeds in processes of their own, as a user would, and prints before, after, gain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in options.seeds:
            run = Path(scratch) / f"seed{seed}"
            settings = [f"run.directory={run}", f"run.seed={seed}", f"data.cache={scratch}/cache"]
            command = [sys.executable, "-m", "arcticjax.train", "--config", CONFIG]
            for setting in settings:
                command += ["--set", setting]
            subprocess.run(command, check=True)
            result = json.loads((run / "result.json").read_text())
            (task,) = result["evaluations"]["after"]
            before, after = (
                result["evaluations"][when][task][METRIC] for when in ("before", "after")
            )
            rows.append(
                {
                    "seed": seed,
                    "before": before,
                    "after": after,
                    "gain": after - before,
                    "seconds": result["seconds"],
                    "fill": result["fill"],
                    "pairs_per_second": result["pairs_per_second"],
                }
            )
    print(f"\n{METRIC} on the held-out packages")
    for row in rows:
        print(
            f"seed {row['seed']}: {row['before']:.4f} -> {row['after']:.4f} ({row['gain']:+.4f}), "
            f"{row['seconds']:.0f} s, fill {row['fill']:.1%}"
        )
    gains = [row["gain"] for row in rows]
    if len(gains) > 1:
        print(
            f"gain {statistics.mean(gains):+.4f}, standard deviation {statistics.stdev(gains):.4f}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
