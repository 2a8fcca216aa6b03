"""Memory of a training step by model size, `train.passes` and `train.remat`, by the compiler.

python -m benchmarks.plan_memory [--topology v5e:4x4] [--batch 2048] [--json FILE]

Every cell is the recipe `configs/pretrain_SIZE.yaml` with these two settings. With `--json` a cell
is written when it is known, and the same command goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arcticjax import config as configs
from arcticjax.plan import topology

SIZES = ("xs", "s", "m", "l")
PASSES = ("two", "one")
REMAT = ("none", "dots", "named", "full")

Cell = dict[str, Any]


def main() -> None:
    """Compiles what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--batch", type=int, default=2048, help="pairs in one step")
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    target = topology.parse(options.topology)
    topology.prepare_environment(target)
    from arcticjax.plan.planner import Planner

    planner = Planner(target)

    def measure(size: str, passes: str, remat: str) -> Cell:
        file = Path(__file__).parents[1] / "configs" / f"pretrain_{size}.yaml"
        settings = [
            f"train.passes={passes}",
            f"train.remat={remat}",
            f"train.global_batch={options.batch}",
        ]
        plan = planner.plan(configs.load_config(file, settings), evaluation=False)
        return {
            "size": size,
            "passes": passes,
            "remat": remat,
            "state": plan.parts["parameters"] + plan.parts["optimizer"],
            "kept": plan.parts["kept_activations"],
            "temporaries": plan.train.temporary_bytes,
            "total": plan.memory_bytes,
            "refused": plan.train.refused,
        }

    print(table(fill(known(options.json), options.sizes, measure, options.json)))


def known(file: Path | None) -> list[Cell]:
    """The cells that a file holds."""
    return json.loads(file.read_text()) if file and file.is_file() else []


def fill(
    cells: list[Cell],
    sizes: list[str],
    measure: Callable[[str, str, str], Cell],
    file: Path | None,
) -> list[Cell]:
    """All cells of these sizes, in order; those that are missing are measured and written."""
    found = {(one["size"], one["passes"], one["remat"]): one for one in cells}
    wanted = [(size, passes, remat) for size in sizes for passes in PASSES for remat in REMAT]
    for name in wanted:
        if name not in found:
            found[name] = measure(*name)
            if file:
                file.write_text(json.dumps(list(found.values()), indent=1) + "\n")
    return [found[name] for name in wanted]


def table(cells: list[Cell]) -> str:
    """A row for each size and number of passes, a column for each remat policy."""
    head = ["model", "passes", "parameters + optimiser", *(f"`{remat}`" for remat in REMAT)]
    lines = [head, ["---"] * len(head)]
    for first in range(0, len(cells), len(REMAT)):
        row = cells[first : first + len(REMAT)]
        lines.append(
            [row[0]["size"], row[0]["passes"], _gib(row[0]["state"]), *(map(_memory, row))]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _memory(cell: Cell) -> str:
    total = _gib(cell["total"])
    if cell["refused"]:
        return f"{total}, refused"
    kept = f"{_gib(cell['kept'])} + " if cell["passes"] == "one" else ""
    return f"{total} ({kept}{_gib(cell['temporaries'])})"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


if __name__ == "__main__":
    main()
