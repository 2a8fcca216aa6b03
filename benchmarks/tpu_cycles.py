"""What a training step spends its time on by the cost model of the TPU compiler, without a TPU.

python -m arcticjax.plan --config configs/pretrain_m.yaml --topology v5e:16x16 --hlo m.hlo
python -m benchmarks.tpu_cycles m.hlo --clock-ghz 1.5

The compiler writes beside each fusion how many cycles it expects. They are added up over loops:
layers and tiles of the loss as often as the program says, microbatches `--microbatches` times
(their number is decided batch by batch). Not counted: collectives, Pallas kernels and copies that
run beside other work, for which it writes nothing. An estimate ranks what a step does; nobody has
measured how well. Clocks: v5e 1.5 GHz, v5p 1.75 (peak over what its matrix units do in a cycle).
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measuring

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(?[\w\[\],]+)")
_PARTS = re.compile(r"\b(attention|embeddings|loss|mlp|norm|optimizer)\b")
COLUMNS = {"part": "", "ms": ".2f", "share": ".1%"}
FUSIONS = {"fusion": "", "part": "", "times": "", "ms": ".2f", "result": ""}


@dataclass(frozen=True)
class Cost:
    """Cycles of one instruction over a whole step. part: the innermost named scope it is of."""

    name: str
    result: str
    part: str
    times: int
    cycles: int


def costs(text: str, microbatches: int) -> list[Cost]:
    """What each instruction of a compiled program costs by the compiler's estimate."""
    bodies: dict[str, list[str]] = {}
    entry = current = None
    for line in text.splitlines():
        begins = _COMPUTATION.match(line)
        if begins:
            current = begins[2]
            bodies[current] = []
            entry = current if begins[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            bodies[current].append(line)
    if entry is None:
        raise SystemExit("this is no compiled program: write one by arcticjax.plan --hlo")
    times: Counter[str] = Counter()

    def count(name: str, often: int) -> None:
        times[name] += often
        for line in bodies[name]:
            loop = _WHILE.search(line)
            if loop:
                count(loop[2], often * (_trips(bodies[loop[1]]) or microbatches))
            elif " call(" in line or " conditional(" in line:
                for called in _CALLED.findall(line):
                    count(called, often)

    count(entry, 1)
    return [
        found
        for name, often in times.items()
        for line in bodies[name]
        if (found := _cost(line, often)) is not None
    ]


def _trips(condition: list[str]) -> int | None:
    """How often a loop runs, where its condition compares with a constant."""
    bounds = re.findall(r"constant\((\d+)\)", "\n".join(condition))
    return int(bounds[0]) if len(bounds) == 1 else None


def _cost(line: str, times: int) -> Cost | None:
    cycles, named = _CYCLES.search(line), _INSTRUCTION.match(line)
    if cycles is None or named is None:
        return None
    scopes = re.search(r'op_name="([^"]*)"', line)
    parts = _PARTS.findall(scopes[1]) if scopes else []
    return Cost(
        named[1], named[2], parts[-1] if parts else "the rest", times, times * int(cycles[1])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path, help="what arcticjax.plan --hlo wrote")
    parser.add_argument("--microbatches", type=int, default=1, help="that a batch takes")
    parser.add_argument("--clock-ghz", type=float, default=1.5)
    parser.add_argument("--top", type=int, default=0, help="also list so many instructions")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    found = costs(options.program.read_text(), options.microbatches)
    if not found:
        raise SystemExit(f"{options.program}: no estimates; only the TPU compiler writes them")
    second = options.clock_ghz * 1e6  # cycles a millisecond
    total = sum(one.cycles for one in found)
    parts: Counter[str] = Counter()
    for one in found:
        parts[one.part] += one.cycles
    rows = [
        {"part": part, "ms": cycles / second, "share": cycles / total}
        for part, cycles in [*parts.most_common(), ("all", total)]
    ]
    print(measuring.table(rows, COLUMNS))
    if options.top:
        dearest = sorted(found, key=lambda one: -one.cycles)[: options.top]
        fusions = [
            {
                "fusion": one.name,
                "part": one.part,
                "times": one.times,
                "ms": one.cycles / second,
                "result": one.result,
            }
            for one in dearest
        ]
        print("\n" + measuring.table(fusions, FUSIONS))
    measuring.write_json(options.json, rows)


if __name__ == "__main__":
    main()
