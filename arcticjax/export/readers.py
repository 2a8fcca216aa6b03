"""Reads a folder as its users will: by sentence-transformers in a process of its own, or by this
package."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from arcticjax.errors import CheckpointError
from arcticjax.export.probes import Probe, probe_rows, probe_vectors
from arcticjax.export.source import make_embedder, open_source
from arcticjax.export.torch_vectors import MISSING
from arcticjax.models.pretrained import read_json
from arcticjax.parallel.mesh import local_mesh

TORCH_TIMEOUT_SECONDS = 1800  # a cold import of torch takes half a minute, a large model more

Reader = Literal["auto", "sentence-transformers", "arcticjax"]


@dataclass(frozen=True)
class FolderVectors:
    """Vectors of the probes, float32 [probes, D], computed in float32 from the weights as stored;
    `as_loaded`: computed in the type that the folder asks for, None where that is float32."""

    exact: np.ndarray
    as_loaded: np.ndarray | None = None


def folder_vectors(
    folder: Path, probes: Sequence[Probe], reader: Reader
) -> tuple[str, FolderVectors]:
    """What read the folder, and the vectors it gives. Raises CheckpointError where it cannot be
    loaded."""
    if not read_here(reader):
        found = torch_vectors([folder], probes)
        if found is not None:
            return found[0], found[1][0]
        if reader != "auto":
            raise CheckpointError(
                "sentence-transformers cannot be imported; install arcticjax[convert]"
            )
    return "arcticjax", _own_vectors(folder, probes)


def read_here(reader: Reader = "auto") -> bool:
    """Whether this package reads folders: where it is asked to, or sentence-transformers is not
    installed."""
    installed = importlib.util.find_spec("sentence_transformers") is not None
    return reader == "arcticjax" or (reader == "auto" and not installed)


def torch_vectors(
    folders: Sequence[Path], probes: Sequence[Probe]
) -> tuple[str, list[FolderVectors]] | None:
    """The library with its version, and the vectors of each folder; None when it is not to be
    had."""
    with tempfile.TemporaryDirectory() as scratch:
        texts, output = Path(scratch, "probes.json"), Path(scratch, "vectors.npz")
        texts.write_text(json.dumps([[probe.side, probe.text, probe.alone] for probe in probes]))
        version = _run_script("torch_vectors.py", texts, output, *folders)
        if version is None:
            return None
        with np.load(output, allow_pickle=False) as found:
            vectors = [
                FolderVectors(found[f"{index}/exact"], found.get(f"{index}/as_loaded"))
                for index in range(len(folders))
            ]
    return f"sentence-transformers {version}", vectors


def torch_states(folder: Path, tokens_S: np.ndarray) -> list[np.ndarray] | None:
    """Hidden states [S, D] of one text by transformers: after the embeddings, then after each
    layer; None when transformers is not to be had or does not name these parts."""
    with tempfile.TemporaryDirectory() as scratch:
        tokens, output = Path(scratch, "tokens.json"), Path(scratch, "states.npz")
        tokens.write_text(json.dumps(tokens_S.tolist()))
        if _run_script("torch_states.py", tokens, output, folder) is None:
            return None
        with np.load(output, allow_pickle=False) as found:
            return [found[str(layer)] for layer in range(len(found))]


def _run_script(name: str, *arguments: Path) -> str | None:
    """The last line that a script beside this file prints; None when it lacks its libraries."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    # -P: the script's own folder must not shadow modules of others.
    command = [sys.executable, "-P", str(Path(__file__).with_name(name)), *map(str, arguments)]
    try:
        done = subprocess.run(  # noqa: S603 (our own script)
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TORCH_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"sentence-transformers took more than {TORCH_TIMEOUT_SECONDS} s"
        ) from None
    if done.returncode == MISSING:
        return None
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise CheckpointError(f"sentence-transformers does not load it: {reason[-1]}")
    return done.stdout.strip().splitlines()[-1]


def _own_vectors(folder: Path, probes: Sequence[Probe]) -> FolderVectors:
    # Process 0 certifies alone.
    source, mesh = open_source(folder), local_mesh()
    asked = read_json(source.tokenizer_folder / "config.json", required=True).get("torch_dtype")
    lower = asked if asked in ("bfloat16", "float16") else None
    # A run certifies under its own mesh; programs of another one need that one around them.
    rows = probe_rows(source.contract)
    with jax.set_mesh(mesh):
        exact = probe_vectors(make_embedder(source, mesh, rows=rows).encode, probes)
        if lower is None:
            return FolderVectors(exact)
        loaded = make_embedder(source, mesh, rows=rows, dtype=jnp.dtype(lower))
        return FolderVectors(exact, probe_vectors(loaded.encode, probes))
