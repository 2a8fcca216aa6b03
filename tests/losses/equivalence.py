"""The equivalence matrix: which ways of computing one loss must agree, and which of them CI tries.

A cell is a choice on every axis. CI runs a slice in which every two choices that may meet do meet
in some cell; `pytest -m matrix` runs all cells. docs/equivalence.md is written by

    python -m tests.losses.equivalence
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

Cell = dict[str, str]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "equivalence.md"
MOST_CELLS = 40

# Size of the difference over the size of what is expected: (loss and other sums, gradients).
# bfloat16: the reference of the loss has the same rounded embeddings, so that only softmax weights
# and results are rounded; that of the step encodes in float32.
TOLERANCES = {
    "loss": {"float32": (1e-5, 1e-5), "bfloat16": (1e-5, 1e-2)},
    "step": {"float32": (2e-6, 1e-5), "bfloat16": (1e-2, 5e-2)},
}


@dataclass(frozen=True)
class Matrix:
    """Axes with their choices, the combinations of them that exist, the axes that change data alone
    (their cells share a compiled program), and the choices that CI leaves out."""

    axes: dict[str, tuple[str, ...]]
    allowed: Callable[[Cell], bool]
    data: frozenset[str]
    on_demand: frozenset[tuple[str, str]] = frozenset({("devices", "4")})

    def cells(self) -> list[Cell]:
        """All cells, those of one program after another."""
        names = sorted(self.axes, key=lambda name: name in self.data)
        choices = itertools.product(*(self.axes[name] for name in names))
        found = (dict(zip(names, choice, strict=True)) for choice in choices)
        return [{name: cell[name] for name in self.axes} for cell in found if self.allowed(cell)]

    def program(self, cell: Cell) -> Cell:
        """What of a cell decides on the compiled program."""
        return {name: choice for name, choice in cell.items() if name not in self.data}

    def slice(self) -> list[Cell]:
        """Cells in which all pairs of choices meet, but for those on demand, with few programs.

        One after the other the cell that adds most: pairs that decide on a program first, then,
        within programs that are there already, the others; among equals the last, which has most
        in it.
        """
        cells = [cell for cell in self.cells()[::-1] if not self.on_demand & cell.items()]
        left = {pair for cell in cells for pair in pairs(cell)}
        programs: list[Cell] = []
        chosen: list[Cell] = []

        def gain(cell: Cell) -> tuple[int, bool, bool, int]:
            program, new = self.program(cell), len(left & pairs(cell))
            return len(left & pairs(program)), new > 0, program in programs, new

        while left:
            best = max(cells, key=gain)
            left -= pairs(best)
            chosen.append(best)
            programs.append(self.program(best))
        return sorted(chosen, key=cells.index, reverse=True)


def pairs(cell: Cell) -> frozenset[tuple[tuple[str, str], tuple[str, str]]]:
    """All pairs of choices that meet in a cell."""
    return frozenset(itertools.combinations(cell.items(), 2))


def _loss_allowed(cell: Cell) -> bool:
    """Without in-batch negatives there must be others, and nothing is gathered to contrast with."""
    return cell["form"] != "candidates" or (
        cell["negatives"] == "hard" and cell["further"] == "no" and cell["mask"] != "guide"
    )


LOSS = Matrix(
    {
        "devices": ("1", "2", "4", "8"),
        "form": ("dense", "tiled", "candidates"),
        "dtype": ("float32", "bfloat16"),
        "positives": ("one", "several"),
        "negatives": ("in-batch", "hard"),
        "texts": ("distinct", "repeated"),
        "mask": ("none", "margin", "guide"),
        "sizes": ("whole", "Matryoshka"),
        "further": ("no", "yes"),
    },
    _loss_allowed,
    frozenset({"positives", "negatives", "texts"}),
)
STEP = Matrix(
    {
        "devices": ("1", "2", "4", "8"),
        "microbatches": ("one", "many"),
        "rows": ("packed", "padded"),
        "passes": ("one", "two"),
        "dtype": ("float32", "bfloat16"),
        "source": ("long", "short"),
    },
    lambda cell: True,
    frozenset({"source"}),
)
MATRICES = {"loss": LOSS, "step": STEP}

MEANINGS = {
    "devices": "devices of the mesh; each holds its share of the queries and documents",
    "form": "`dense`: the whole score matrix, differentiated by JAX; `tiled`: what training runs; "
    "`candidates`: in-batch negatives off",
    "dtype": "of the embeddings (loss), of activations and matrix products (step)",
    "positives": "of a query: one, or up to three",
    "negatives": "other documents of the batch, or hard negatives too: shared between queries and "
    "devices, positives of other queries, named twice",
    "texts": "whether queries and documents occur twice; what has the same id is no negative",
    "mask": "what keeps a false negative out besides ids: a margin above the positive, or a guide "
    "model",
    "sizes": "whole embeddings, or three Matryoshka sizes at once",
    "further": "query-query and document-document scores as further negatives",
    "microbatches": "of a device in a step",
    "rows": "several texts to a row, or one",
    "passes": "`train.passes`",
    "source": "texts of which source: their lengths decide the layout",
}


INTRODUCTION = """# Equivalence

One loss can be computed in many ways: on one device or several, with the whole score matrix or in
tiles, from packed or padded texts, in one microbatch or many. All must give the same loss and the
same gradients. Each cell below is compared with a float64 NumPy reference that knows nothing of
devices, tiles or layouts.

CI runs {tried} cells in which every two choices that may meet do meet, 4 devices left out. All
{total} run with

```
uv run --group test pytest -m matrix
```

This page is written by `python -m tests.losses.equivalence` from the definition that the tests use,
and a test compares the two.
"""
ABOUT = {
    "loss": "Loss, accuracy and mean cosines over all devices, and the gradients of queries, "
    "documents and\ntemperature. An error of the temperature's gradient is relative to the sizes "
    "of its terms, which\ncancel.\n",
    "step": "Loss and gradient of every parameter of a tiny encoder. The reference encodes padded "
    "texts in\nfloat32, computes the loss and its gradient with respect to embeddings in float64, "
    "and pulls that\nback through the plain encoder.\n",
}
ELSEWHERE = """
## Not in this table

Compared with a definition that has the whole score matrix, or with the run of one device:

- A whole step with hard negatives, several positives and teacher scores (list files), in-batch
  negatives on and off: `tests/step/test_list_step.py`.
- `loss.symmetric`, `loss.query_query`, `loss.document_query`, `loss.document_document`, Matryoshka,
  a margin, a guide, a learned temperature and a bfloat16 gather through a whole step:
  `tests/step/test_objective.py`.
- Distillation: `tests/losses/test_distillation.py`.
- `mesh.fsdp` and `mesh.slices`, and several processes: `tests/step/test_train_step.py` and
  `tests/train/test_train_devices.py`.
"""


def name(cell: Cell) -> str:
    return "-".join(cell.values())


def every_cell(matrix: Matrix) -> pytest.MarkDecorator:
    """All cells as `cell` of a test, those outside the slice on demand."""
    chosen = matrix.slice()
    return pytest.mark.parametrize(
        "cell",
        [
            pytest.param(cell, marks=() if cell in chosen else pytest.mark.matrix)
            for cell in matrix.cells()
        ],
        ids=name,
    )


def page() -> str:
    """The page of the docs."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    slices = {part: matrix.slice() for part, matrix in MATRICES.items()}
    tried = sum(map(len, slices.values()))
    total = sum(len(matrix.cells()) for matrix in MATRICES.values())
    yield INTRODUCTION.format(tried=tried, total=total)
    for part, matrix in MATRICES.items():
        yield f"## The {part}\n"
        yield ABOUT[part]
        yield "| axis | choices | meaning |"
        yield "|---|---|---|"
        for axis, choices in matrix.axes.items():
            yield f"| {axis} | {', '.join(choices)} | {MEANINGS[axis]} |"
        yield "\nLargest relative error allowed:\n"
        yield "| dtype | loss | gradients |"
        yield "|---|---|---|"
        for dtype, (loss, gradients) in TOLERANCES[part].items():
            yield f"| {dtype} | {loss:g} | {gradients:g} |"
        yield f"\nIn CI, {len(slices[part])} of {len(matrix.cells())} cells:\n"
        yield f"| {' | '.join(matrix.axes)} |"
        yield "|" + "---|" * len(matrix.axes)
        for cell in slices[part]:
            yield f"| {' | '.join(cell.values())} |"
        if part != list(MATRICES)[-1]:
            yield ""
    yield ELSEWHERE.rstrip("\n")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
