"""The training command, run as a user types it or in this process, and what it left."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from arcticjax import errors
from arcticjax.checkpoint.orbax_io import read_arrays
from arcticjax.checkpoint.step_directories import StepDirectories
from arcticjax.checkpoint.store import CheckpointStore
from arcticjax.train import __main__ as command

ROOT = str(Path(__file__).resolve().parents[2])
# Reading an export back imports torch, which takes longer than all the rest; plots take matplotlib.
BARE = {"export.enabled": False, "report.plots": False}
UNSCORED = {"evaluation.tasks": [], **BARE}


class Heard(logging.Handler):
    """What jax says that it compiles: name, types of the arguments."""

    def __init__(self):
        super().__init__()
        self.programs = []

    def emit(self, record):
        if record.msg.startswith("Compiling"):
            name, types = record.args[:2]
            self.programs.append((name.removeprefix("jit(").removesuffix(")"), types))


def train(file, *sets: str) -> None:
    arguments = ["--config", str(file)]
    for one in sets:
        arguments += ["--set", one]
    command.main(arguments)


def fails(file, kind: type[errors.ArcticError], match: str, *sets: str) -> str:
    """The message with which the command ends, as its user sees it, and with the code of `kind`."""
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), pytest.raises(SystemExit) as left:
        errors.run_cli(lambda: train(file, *sets))
    assert left.value.code == kind.exit_code, shown.getvalue()
    _, _, message = f"\n{shown.getvalue()}".rpartition("\nerror: ")
    assert re.search(match, message), message
    return message


def start(
    file, *sets: str, devices: int = 1, environment: dict[str, str] | None = None, folder=None
) -> subprocess.Popen:
    """The command as a user types it, in its own process and, if given, another folder."""
    arguments = [sys.executable, "-m", "arcticjax.train", "--config", str(file)]
    for one in sets:
        arguments += ["--set", one]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        arguments,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ROOT, "XLA_FLAGS": flags, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def lines(folder) -> list[dict]:
    return [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]


def losses(folder) -> list[tuple[int, str, float]]:
    return [(line["step"], line["source"], line["loss"]) for line in lines(folder)]


def weights(folder):
    return CheckpointStore(folder / "run" / "checkpoints").restore_params()


def state(folder, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path."""
    steps = StepDirectories(folder / "run" / "checkpoints")
    _, manifest = steps.verify(step)
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in manifest.leaves.items()
    }
    return read_arrays(steps.path(step), wanted, as_numpy=True)


def same(left, right) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)
