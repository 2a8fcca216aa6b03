"""Compiling a program and reading what the compiler says of it: memory, or why it does not fit."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax

from arcticjax.parallel import hlo

SECONDS_BETWEEN_LINES = 10.0

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"(?P<{0}>[\d.]+)(?P<{0}_unit>[KMGT]?)i?B?"
# What the TPU compiler says when a program needs more memory than there is: early, within seconds,
# or once everything has its place. The early figure is said to be of temporaries but holds
# arguments and results, too: twice the argument for a program that only doubles its elements.
_REFUSALS = (
    re.compile(
        rf"temporaries \({_SIZE.format('needed')}\) exceeds available HBM "
        rf"\({_SIZE.format('room')}\)"
    ),
    re.compile(rf"Used {_SIZE.format('needed')} of {_SIZE.format('room')} hbm", re.IGNORECASE),
)


@dataclass(frozen=True)
class Compiled:
    """A program as compiled for one target; bytes are of one device.

    memory_bytes: all that it needs. temporary_bytes, code_bytes: what the compiler adds to its
    arguments and results. refused: the compiler's words where it does not fit; it then says how
    much is needed, and nothing of collectives. text: the program after all optimisations.
    """

    seconds: float
    argument_bytes: int
    memory_bytes: int
    temporary_bytes: int
    code_bytes: int = 0
    collectives: list[hlo.Collective] = field(default_factory=list)
    refused: str | None = None
    text: str = field(default="", repr=False)


def compile_program(label: str, lowered: jax.stages.Lowered, arguments: Any) -> Compiled:
    """Compiles, saying every ten seconds on stderr that it is at work.

    arguments: the shapes and shardings that it was lowered for.
    """
    needed = device_bytes(arguments)
    began = time.monotonic()
    with _telling(label):
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as problem:
            used = out_of_memory(str(problem))
            if used is None:
                raise
            return Compiled(
                seconds=time.monotonic() - began,
                argument_bytes=needed,
                memory_bytes=used,
                temporary_bytes=max(0, used - needed),
                refused=str(problem).splitlines()[0],
            )
        found: Any = compiled.memory_analysis()
        text = compiled.as_text() or ""
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    temporary, code = found.temp_size_in_bytes, found.generated_code_size_in_bytes
    return Compiled(
        seconds=time.monotonic() - began,
        argument_bytes=found.argument_size_in_bytes,
        memory_bytes=found.argument_size_in_bytes + results + temporary + code,
        temporary_bytes=results + temporary,
        code_bytes=code,
        collectives=hlo.collectives(text),
        text=text,
    )


def out_of_memory(message: str) -> int | None:
    """Bytes that a refused program needs, by the compiler's message; None for another message."""
    for pattern in _REFUSALS:
        match = pattern.search(message)
        if match:
            return int(float(match["needed"]) * _UNITS[match["needed_unit"]])
    return None


def device_bytes(shapes: Any) -> int:
    """Bytes of a tree of shapes with shardings on one device, without the device's padding."""
    total = 0
    for one in jax.tree.leaves(shapes):
        size = 1
        for length in one.sharding.shard_shape(one.shape):
            size *= length
        total += size * one.dtype.itemsize
    return total


@contextlib.contextmanager
def _telling(label: str) -> Iterator[None]:
    """Says on stderr what is being compiled, and again while it takes long."""
    print(f"compiling {label} ...", file=sys.stderr, flush=True)
    began, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(SECONDS_BETWEEN_LINES):
            seconds = time.monotonic() - began
            print(f"compiling {label}: {seconds:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
