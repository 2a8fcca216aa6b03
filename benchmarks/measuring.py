"""What all benchmarks share: pinned threads, interleaved timing, memory, the machine, the table.

Sides are timed in turn (A B A B), so that a busy machine is as unkind to one as to the other, and
compared round by round: the figure is the median of the rounds' ratios. CPU-seconds are the better
clock where others use the machine; wall time is reported beside them.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = (
    "arcticjax",
    "jax",
    "jaxlib",
    "numpy",
    "tokenizers",
    "torch",
    "transformers",
    "sentence-transformers",
)
_ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Samples:
    """Seconds of each timed round of one side, and what its last call returned."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    value: Any = None

    def median(self, clock: str = "cpu") -> float:
        """Median seconds on one clock, `cpu` or `wall`."""
        return statistics.median(getattr(self, clock))


def pin(threads: int | None) -> None:
    """Keeps this process, and what it starts, to `threads` threads on as many CPUs of its own
    choice (the last ones); None leaves both alone.

    Call it before jax, torch or tokenizers are imported: they read their thread counts once.
    """
    if threads is None:
        return
    loaded = {"jax", "torch", "tokenizers"} & set(sys.modules)
    if loaded:
        raise RuntimeError(f"pin() comes too late: {', '.join(sorted(loaded))} already imported")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)
    if threads == 1:
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


def interleave(
    sides: Mapping[str, Callable[[], Any]], repeats: int, warm: int = 1
) -> dict[str, Samples]:
    """Calls every side in turn, `repeats` rounds, after `warm` rounds that do not count.

    A side must not return before its work is done (`block_until_ready`, `synchronize`).
    """
    found = {name: Samples() for name in sides}
    for turn in range(warm + repeats):
        for name, call in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            value = call()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            found[name].value = value
            if turn >= warm:
                found[name].wall.append(wall)
                found[name].cpu.append(cpu)
    return found


def ratio(samples: Mapping[str, Samples], slower: str, faster: str, clock: str = "cpu") -> float:
    """How many times longer `slower` takes than `faster`: the median of the rounds' ratios."""
    rounds = zip(getattr(samples[slower], clock), getattr(samples[faster], clock), strict=True)
    return statistics.median(long / short for long, short in rounds)


def resident() -> int:
    """Bytes of memory this process holds now."""
    return _status("VmRSS")


def peak_resident() -> int:
    """The most bytes it held since it began or since `forget_peak`.

    Not `ru_maxrss`: a started process inherits that from the one that started it.
    """
    return _status("VmHWM")


def forget_peak() -> None:
    """Lets `peak_resident` count from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def in_own_process(module: str, arguments: Sequence[str], timeout: float | None = None) -> Any:
    """What `python -m module arguments` prints as its last line, JSON; its stderr passes through.

    Raises subprocess.CalledProcessError where it fails.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command, cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout
    )
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """Date, versions, processor, threads and devices: what a figure means nothing without."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": _versions(),
        "processor": _processor(),
        "threads": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "processors": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "command": " ".join(["python -m", _program(), *sys.argv[1:]]),
    }
    if "jax" in sys.modules:
        import jax

        devices = jax.devices()
        found["devices"] = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    return found


def describe(facts: Mapping[str, Any]) -> str:
    """The machine in one line, to stand above a table."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    devices = f", {facts['devices']}" if "devices" in facts else ""
    return (
        f"{facts['date']}, {facts['processor']}, {facts['threads']} of {facts['processors']} "
        f"processors, load {facts['load']}{devices}; Python {facts['python']}, {versions}"
    )


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table. columns: key in the rows -> format specification, '' for plain.

    A value that is absent or None is a dash.
    """
    cells = [[key.replace("_", " ") for key in columns]]
    for row in rows:
        cells.append(
            [
                "-" if row.get(key) is None else format(row[key], form)
                for key, form in columns.items()
            ]
        )
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = [
        "| " + " | ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)


def write_json(path: Path | None, rows: Sequence[Mapping[str, Any]], **headline: Any) -> None:
    """Writes {"machine", "rows", headline figures}; nothing where `path` is None."""
    if path is not None:
        content = {"machine": machine(), **headline, "rows": list(rows)}
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _status(field_name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field_name:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field_name}")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=_ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or None


def _program() -> str:
    path = Path(sys.argv[0])
    return f"benchmarks.{path.stem}" if path.parent.name == "benchmarks" else path.name
