"""Proves an exported folder by its vectors: the same texts, embedded as in training and from the
folder."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from arcticjax import __version__
from arcticjax.config.contract import TextContract
from arcticjax.errors import CheckpointError
from arcticjax.export.folder import (
    OWN_FILE,
    check_replaceable,
    move_into_place,
    sync,
    write_folder,
    write_json,
)
from arcticjax.export.source import make_embedder, open_source
from arcticjax.export.torch_vectors import MISSING
from arcticjax.models.pretrained import read_json
from arcticjax.models.safe_weights import digest, weight_files
from arcticjax.models.spec import ModelSpec
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.parallel.mesh import local_mesh

CERTIFICATE_FILE = "certificate.json"
TORCH_TIMEOUT_SECONDS = 1800  # a cold import of torch takes half a minute, a large model more

Side = Literal["query", "document"]
Embed = Callable[[list[str], Side], np.ndarray]
Reader = Literal["auto", "sentence-transformers", "arcticjax"]


@dataclass(frozen=True)
class Probe:
    """One text to compare."""

    name: str
    side: Side
    text: str


PROBES: tuple[Probe, ...] = (
    Probe("empty document", "document", ""),
    Probe("empty query", "query", ""),
    Probe("one token", "document", "water"),
    Probe("query", "query", "how do cranes sleep?"),
    Probe("document", "document", "Cranes sleep standing on one leg, often in shallow water."),
    Probe("upper case and digits", "document", "NASA's 2nd Report (v1.5): 3,000 km/h -- 100%"),
    Probe("accents", "query", "d\u00e9j\u00e0 vu e\u0301 \u00fcber Stra\u00dfe \u0130stanbul"),
    Probe("scripts", "document", "\u96ea\u3068\u306f \uc548\ub155 \u043f\u0440\u0438 \u05e9\u05dc"),
    Probe(
        "emoji",
        "document",
        "fine \U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    ),
    Probe("white space", "document", "  tab\tnew\nline\u00a0and\u200bzero\x00width \ufffd  "),
    Probe("special tokens as text", "document", "a [SEP] b [MASK] c [CLS] </s>"),
    Probe("one long word", "document", "x" * 300),
    Probe("truncated document", "document", " ".join(f"word{n} of many," for n in range(900))),
    Probe("truncated query", "query", " ".join(f"why {n}" for n in range(900))),
)


@dataclass(frozen=True)
class Certificate:
    """`max_difference`: largest absolute difference of a vector element over `probes` (name:
    difference).

    `reader` is what loaded the folder. `notes` say what the comparison leaves out.
    """

    passed: bool
    tolerance: float
    max_difference: float
    reader: str
    probes: dict[str, float]
    notes: tuple[str, ...]
    weights_sha256: str
    arcticjax_version: str


def certify(
    folder: Path, embed: Embed, *, tolerance: float = 1e-5, reader: Reader = "auto"
) -> Certificate:
    """Compares `folder` with `embed` on `PROBES` and writes `certificate.json` into it.

    embed: (texts, 'query' | 'document') -> float32 [texts, D] of the encoder as trained.
    tolerance: largest absolute difference of an element of a unit vector, in float32. reader:
    'auto' loads the folder in sentence-transformers where that is installed, else through this
    package.

    Raises CheckpointError when a difference is above the tolerance or the folder does not load: it
    is then renamed to `<folder>.rejected`, so that nobody takes it for good.
    """
    folder = Path(folder).absolute()
    contract = TextContract.from_dict(
        read_json(folder / OWN_FILE, required=True).get("contract", {})
    )
    spec = ModelSpec.from_hf(read_json(folder / "config.json", required=True))
    probes = probes_for(contract, TextTokenizer.from_file(folder), _scaled_beyond(spec))
    return _certify(
        folder, probe_vectors(embed, probes), probes, contract, tolerance, reader, folder
    )


def write_certified(
    output: Path,
    *,
    spec: ModelSpec,
    params: Mapping[str, Any],
    tokenizer_folder: Path,
    contract: TextContract,
    embed: Embed,
    tolerance: float = 1e-5,
    reader: Reader = "auto",
) -> Certificate | None:
    """Writes the folder and certifies it before it gets its name: `output` is absent, old or good.

    In a run of several processes each must call this, since `embed` runs on all devices; process 0
    alone writes, the others get None. Raises as `write_folder` and `certify`.
    """
    output = Path(output).absolute()
    probes = probes_for(contract, TextTokenizer.from_file(tokenizer_folder), _scaled_beyond(spec))
    vectors = probe_vectors(embed, probes)
    if jax.process_index() != 0:
        return None
    check_replaceable(output)
    staging = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.unverified")
    try:
        write_folder(
            staging, spec=spec, params=params, tokenizer_folder=tokenizer_folder, contract=contract
        )
        certificate = _certify(staging, vectors, probes, contract, tolerance, reader, output)
        sync(staging)
        move_into_place(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return certificate


def probes_for(
    contract: TextContract, tokenizer: TextTokenizer, scaled_beyond: int | None = None
) -> tuple[Probe, ...]:
    """The probes on which an exact folder agrees.

    A folder has one maximum length: where queries are cut shorter in training, those longer than
    that are cut later in the folder, and have another vector. So have all texts of a batch of
    PyTorch's whose longest has more than `scaled_beyond` tokens, where that is given: it scales
    rotary positions by the batch, and we by the text.
    """
    longest = max(contract.query_length, contract.document_length)
    sides = {
        "query": (contract.query_prompt, contract.query_length),
        "document": (contract.document_prompt, contract.document_length),
    }
    chosen = []
    for probe in PROBES:
        prompt, length = sides[probe.side]
        tokens = 2 + len(tokenizer.encode([prompt + probe.text])[0])
        if scaled_beyond is not None and min(tokens, length) > scaled_beyond:
            continue
        if length == longest or tokens <= length:
            chosen.append(probe)
    return tuple(chosen)


def _scaled_beyond(spec: ModelSpec) -> int | None:
    return None if spec.rotary is None else spec.rotary.trained_positions


def probe_vectors(embed: Embed, probes: Sequence[Probe]) -> np.ndarray:
    """float32 [probes, D], in the order of `probes`; matrix products at full float32 precision."""
    rows: dict[int, np.ndarray] = {}
    with jax.default_matmul_precision("highest"):
        for side in ("query", "document"):
            chosen = [index for index, probe in enumerate(probes) if probe.side == side]
            if chosen:
                vectors = embed([probes[index].text for index in chosen], side)
                rows.update(zip(chosen, np.asarray(vectors, np.float32), strict=True))
    return np.stack([rows[index] for index in range(len(probes))])


def _certify(
    folder: Path,
    expected: np.ndarray,
    probes: Sequence[Probe],
    contract: TextContract,
    tolerance: float,
    reader: Reader,
    name: Path,
) -> Certificate:
    """Compares and writes; on failure moves the folder to `<name>.rejected`."""
    notes = []
    if contract.query_length != contract.document_length:
        side = "query" if contract.query_length < contract.document_length else "document"
        cut = min(contract.query_length, contract.document_length)
        notes.append(
            f"In training a {side} was cut to {cut} tokens. This folder cuts only at "
            f"{max(contract.query_length, contract.document_length)}, so a longer {side} gives "
            f"another vector here; no such text was compared."
        )
    beyond = _scaled_beyond(ModelSpec.from_hf(read_json(folder / "config.json", required=True)))
    if beyond is not None and max(contract.query_length, contract.document_length) > beyond:
        notes.append(
            f"PyTorch scales rotary positions by the longest text of a batch, the encoder as "
            f"trained by each text: no text of more than {beyond} tokens was compared."
        )
    used, found, failure = "none", None, ""
    try:
        used, found = _folder_vectors(folder, probes, reader)
        if used == "arcticjax":
            notes.append("Not loaded in sentence-transformers, which is not installed.")
    except CheckpointError as error:
        failure = str(error)
    differences = {probe.name: float("nan") for probe in probes}
    if found is not None and found.shape == expected.shape:
        errors = np.abs(found - expected).max(axis=1)
        differences = {
            probe.name: float(error) for probe, error in zip(probes, errors, strict=True)
        }
    elif found is not None:
        failure = f"the folder gives vectors of shape {found.shape}, expected {expected.shape}"
    largest = float(np.max(list(differences.values())))
    certificate = Certificate(
        passed=not failure and largest <= tolerance,
        tolerance=tolerance,
        max_difference=largest,
        reader=used,
        probes=differences,
        notes=tuple(notes),
        weights_sha256=digest(weight_files(folder)),
        arcticjax_version=__version__,
    )
    content = dataclasses.asdict(certificate)
    if not np.isfinite(largest):  # JSON has no NaN
        content |= {"max_difference": None, "probes": dict.fromkeys(differences)}
    write_json(folder / CERTIFICATE_FILE, content)
    if certificate.passed:
        return certificate
    rejected = name.with_name(f"{name.name}.rejected")
    move_into_place(folder, rejected)
    worst = max(differences, key=lambda key: (np.isnan(differences[key]), differences[key]))
    raise CheckpointError(
        f"{name}: the exported files are not the trained encoder: "
        + (
            failure
            or f"vectors differ by up to {largest:.3g} ({worst!r}), allowed is {tolerance:.3g}"
        )
        + f" (read by {used}). The files were moved to {rejected}; do not use them, and report "
        f"this with its {CERTIFICATE_FILE}"
    )


def _folder_vectors(
    folder: Path, probes: Sequence[Probe], reader: Reader
) -> tuple[str, np.ndarray]:
    """What read the folder, and its vectors, float32 [probes, D]."""
    if reader == "sentence-transformers" or (
        reader == "auto" and importlib.util.find_spec("sentence_transformers") is not None
    ):
        found = _torch_vectors([folder], probes)
        if found is not None:
            return found[0], found[1][0]
        if reader != "auto":
            raise CheckpointError(
                "sentence-transformers cannot be imported; install arcticjax[convert]"
            )
    return "arcticjax", _own_vectors(folder, probes)


def _torch_vectors(
    folders: Sequence[Path], probes: Sequence[Probe]
) -> tuple[str, np.ndarray] | None:
    """The library with its version, and float32 [folders, probes, D]; None when it is not to be
    had."""
    script = Path(__file__).with_name("torch_vectors.py")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with tempfile.TemporaryDirectory() as scratch:
        texts, output = Path(scratch, "probes.json"), Path(scratch, "vectors.npy")
        texts.write_text(json.dumps([[probe.side, probe.text] for probe in probes]))
        # -P: the script's own folder must not shadow modules of others.
        command = [sys.executable, "-P", str(script), str(texts), str(output), *map(str, folders)]
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
        version = done.stdout.strip().splitlines()[-1]
        return f"sentence-transformers {version}", np.load(output, allow_pickle=False)


def _own_vectors(folder: Path, probes: Sequence[Probe]) -> np.ndarray:
    # Process 0 certifies alone.
    embedder = make_embedder(open_source(folder), local_mesh())
    # A run certifies under its own mesh; programs of another one need that one around them.
    with jax.set_mesh(embedder.mesh):
        return probe_vectors(embedder.encode, probes)
