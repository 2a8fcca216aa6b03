"""What a compiled program sends between devices, read from its HLO text.

`collectives(compiled.as_text())` lists every collective with its payload, its groups of devices and
whether a loop repeats it. It needs no device and no backend: tests use it on fake CPU devices, and
`arcticjax.plan` on programs that were compiled for a TPU slice elsewhere.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

OPS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

Groups = tuple[tuple[int, ...], ...]

_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<op>"
    + "|".join(OPS)
    + r")(?P<start>-start)?\("
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+\d+\w*)\[(?P<sizes>[\d,]*)\]")
_CALLS = re.compile(
    r"\b(?P<role>body|condition|to_apply|calls|called_computations|branch_computations|"
    r"true_computation|false_computation)=(?P<names>\{[^}]*\}|%?[\w.\-]+)"
)
_IOTA = re.compile(
    r"replica_groups=\[(?P<shape>[\d,]+)\]<=\[(?P<sizes>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?"
)
_MESH = re.compile(r"replica_groups=mesh\[(?P<sizes>[^\]]*)\] ?\{(?P<axes>[^}]*)\}")
_LISTED = re.compile(
    r"(?:replica_groups|source_target_pairs)=(?P<groups>\{(?:\{[\d,]*\},?)*\})(?=[,\s]|$)"
)
_PURPOSE = re.compile(r'op_name="(?P<name>[^"]*)"')


@dataclass(frozen=True)
class Collective:
    """One collective instruction of a program.

    op: one of `OPS`, whether or not it runs asynchronously. bytes: its payload on one device, the
    larger side: what an all-gather gives, what a reduce-scatter takes. groups: the devices, by
    their place in the mesh, that exchange with each other (for a collective-permute: source and
    target). in_loop: a while loop repeats it. purpose: the operation in the traced program.
    """

    name: str
    op: str
    bytes: int
    groups: Groups
    in_loop: bool
    purpose: str

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The axes of a mesh (name -> size, outermost first) along which the groups lie.

        Axes of size 1 are left out; () where the groups follow no set of axes.
        """
        names = [name for name, size in mesh.items() if size > 1]
        places = np.arange(int(np.prod(list(mesh.values())))).reshape([mesh[n] for n in names])
        found = {frozenset(group) for group in self.groups}
        if self.op == "collective-permute":
            return _permuted(self.groups, places, names)
        for count in range(1, len(names) + 1):
            for chosen in itertools.combinations(range(len(names)), count):
                rest = [axis for axis in range(len(names)) if axis not in chosen]
                size = int(np.prod([places.shape[axis] for axis in chosen]))
                expected = places.transpose(*rest, *chosen).reshape(-1, size)
                if found == {frozenset(group) for group in expected.tolist()}:
                    return tuple(names[axis] for axis in chosen)
        return ()


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program, in the order of its text.

    Asynchronous pairs count once; groups of one device send nothing and are left out. Raises
    ValueError for groups in a notation that is not known.
    """
    devices = _devices(text)
    repeated = _repeated(text)
    return [
        Collective(
            name=match["name"],
            op=match["op"],
            bytes=_payload(match, groups),
            groups=groups,
            in_loop=computation in repeated,
            purpose=found["name"] if (found := _PURPOSE.search(line)) else "",
        )
        for computation, line in _lines(text)
        if (match := _INSTRUCTION.match(line))
        for groups in [_groups(line, devices)]
        if any(len(group) > 1 for group in groups)
    ]


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """(computation, line) of every instruction."""
    computation = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header and not line.startswith("HloModule"):
            computation = header["name"]
        elif line.startswith((" ", "\t")):
            yield computation, line


def _repeated(text: str) -> set[str]:
    """Names of the computations that run inside a while loop, however deep."""
    calls: dict[str, set[str]] = {}
    waiting: list[str] = []
    for computation, line in _lines(text):
        for match in _CALLS.finditer(line):
            names = re.findall(r"[\w.\-]+", match["names"])
            calls.setdefault(computation, set()).update(names)
            if match["role"] in ("body", "condition"):
                waiting += names
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += calls.get(name, ())
    return found


def _payload(match: re.Match[str], groups: Groups) -> int:
    arrays = [_bytes(array) for array in _ARRAY.finditer(match["type"])]
    if match["op"] == "collective-permute" and match["start"]:
        arrays = arrays[:2]  # then come the contexts of the transfer
    if match["start"] and match["op"] != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # (what goes in, what comes out)
    scale = len(groups[0]) if match["op"] == "reduce-scatter" else 1
    return sum(arrays) * scale


def _bytes(array: re.Match[str]) -> int:
    found = re.search(r"\d+", array["dtype"])
    bits = 8 if array["dtype"] == "pred" or found is None else int(found[0])
    return int(np.prod(_integers(array["sizes"]), dtype=np.int64)) * bits // 8


def _groups(line: str, devices: int) -> Groups:
    iota = _IOTA.search(line)
    if iota:
        ids = np.arange(int(np.prod(_integers(iota["sizes"])))).reshape(_integers(iota["sizes"]))
        if iota["order"]:
            ids = ids.transpose(_integers(iota["order"]))
        return tuple(map(tuple, ids.reshape(_integers(iota["shape"])).tolist()))
    mesh = _MESH.search(line)
    if mesh:
        return _mesh_groups(mesh["sizes"], mesh["axes"], line)
    listed = _LISTED.search(line)
    if listed is None:
        raise ValueError(f"no groups of devices that can be read in: {line.strip()[:200]}")
    groups = tuple(
        tuple(_integers(group)) for group in re.findall(r"\{([\d,]*)\}", listed["groups"][1:-1])
    )
    return groups or (tuple(range(devices)),)


def _mesh_groups(sizes: str, axes: str, line: str) -> Groups:
    """Groups along `axes` ('a','b') of a mesh ('a'=4,'b'=2)."""
    named = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", sizes)}
    chosen = re.findall(r"'([^']*)'", axes)
    # Parts of axes and devices in another order have a notation of their own.
    if axes.replace(" ", "") != ",".join(f"'{name}'" for name in chosen) or "(" in sizes:
        raise ValueError(f"a mesh of devices that cannot be read in: {line.strip()[:200]}")
    order = [name for name in named if name not in chosen] + chosen
    ids = np.arange(int(np.prod(list(named.values())))).reshape(list(named.values()))
    size = int(np.prod([named[name] for name in chosen]))
    placed = ids.transpose([list(named).index(name) for name in order]).reshape(-1, size)
    return tuple(map(tuple, placed.tolist()))


def _devices(text: str) -> int:
    """Devices that run the program, from its first line."""
    head = text.partition("\n")[0]
    counts = [
        int(match[1])
        for name in ("num_partitions", "replica_count")
        if (match := re.search(rf"\b{name}=(\d+)", head))
    ]
    return int(np.prod(counts)) if counts else 1


def _permuted(pairs: Groups, places: np.ndarray, names: list[str]) -> tuple[str, ...]:
    """The axes along which a permutation's pairs differ."""
    if not pairs:
        return ()
    coordinates = np.stack(np.unravel_index(np.array(pairs).ravel(), places.shape))
    sources, targets = coordinates.reshape(len(names), -1, 2).transpose(2, 0, 1)
    return tuple(
        name for name, moved in zip(names, (sources != targets).any(1), strict=True) if moved
    )


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]
