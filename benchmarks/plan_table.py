"""The plans of recipes as a Markdown table, from the files that `python -m arcticjax.plan --json`
wrote.

python -m benchmarks.plan_table OUT/*.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HEAD = (
    "| plan | slice | global batch | HBM a chip | parameters + optimiser | kept activations | "
    "temporaries | model FLOPs a step | all-gather | reduced | projected step | pairs/s | MFU |"
)


def main() -> None:
    """Prints one row a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    print(HEAD)
    print("|" + "---|" * (HEAD.count("|") - 1))
    for file in options.files:
        print(row(file.stem, json.loads(file.read_text())))


def row(name: str, plan: dict[str, Any]) -> str:
    """One plan's row; what was not projected is a dash."""
    parts = plan["hbm_parts"]
    known = {"parameters", "optimizer", "kept_activations", "batch", "code", "padding"}
    temporaries = sum(size for part, size in parts.items() if part not in known)
    sent = {"all-gather": 0, "all-reduce": 0, "reduce-scatter": 0}
    for one in plan["collectives"]:
        sent[one["op"]] = sent.get(one["op"], 0) + one["bytes"]
    projection = plan["projection"]
    cells = [
        name,
        plan["topology"],
        f"{plan['global_batch']:,}",
        f"{_gib(plan['hbm_bytes_per_chip'])} of {_gib(plan['hbm_capacity_bytes'])}"
        + ("" if plan["fits"] else ", does not fit"),
        _gib(parts["parameters"] + parts["optimizer"]),
        _gib(parts["kept_activations"]),
        _gib(temporaries),
        f"{plan['model_flops_per_step'] / 1e15:.2f} P",
        _mib(sent["all-gather"]),
        _mib(sent["all-reduce"] + sent["reduce-scatter"]),
        f"{1000 * plan['projected_step_seconds']:.0f} ms" if projection else "-",
        f"{plan['pairs_per_second']:,.0f}" if projection else "-",
        f"{100 * projection['mfu']:.0f} %" if projection else "-",
    ]
    return "| " + " | ".join(cells) + " |"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


if __name__ == "__main__":
    main()
