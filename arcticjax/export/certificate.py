"""Proves an exported folder by its vectors: the same texts, embedded as in training and from the
folder."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from arcticjax import __version__
from arcticjax.config.contract import TextContract
from arcticjax.errors import CheckpointError
from arcticjax.export import layers, readers
from arcticjax.export.card import Facts, write_card
from arcticjax.export.folder import (
    AS_IS,
    OWN_FILE,
    Storage,
    check_replaceable,
    check_truncation,
    move_into_place,
    sync,
    write_folder,
    write_json,
)
from arcticjax.export.probes import (
    Embed,
    Probe,
    probe_tokens,
    probe_vectors,
    probes_for,
)
from arcticjax.export.readers import Reader
from arcticjax.export.record import facts_of
from arcticjax.export.shards import SHARD_BYTES
from arcticjax.export.source import Source, open_source
from arcticjax.models.families import is_original
from arcticjax.models.pretrained import read_json
from arcticjax.models.safe_weights import WEIGHTS, WEIGHTS_INDEX, digest, weight_files
from arcticjax.models.spec import ModelSpec
from arcticjax.models.tokenizer import TextTokenizer

CERTIFICATE_FILE = "certificate.json"

# Largest absolute difference of an element of a unit vector: computed in float32 from the same
# weights, and for a folder in bfloat16, as it loads, from the encoder as trained.
TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 1e-2

# Files of a folder that are neither weights nor code.
_SETTINGS = (".json", ".txt", ".model")
_ORIGINAL_NOTE = (
    "The folder is in the form of the code that was published with it. That code was not run: "
    "compared with the weights under transformers' names, beside the folder's own tokenizer, "
    "modules and prompts, as {} reads them."
)


@dataclass(frozen=True)
class Certificate:
    """`max_difference`: largest absolute difference of a vector element over `probes` (name:
    difference), in float32 from the weights as stored; no more than `tolerance` when `passed`.

    Where weights are stored in less than float32, `as_loaded_difference` is that of vectors
    computed in the folder's own type from those of the encoder as trained, its limit
    `as_loaded_tolerance`; else both are None. `dimension`: numbers of a vector. `reader` is what
    loaded the folder. `notes` say what the comparison leaves out.
    """

    passed: bool
    tolerance: float
    max_difference: float
    as_loaded_tolerance: float | None
    as_loaded_difference: float | None
    dtype: str
    dimension: int
    reader: str
    probes: dict[str, float]
    notes: tuple[str, ...]
    weights_sha256: str
    arcticjax_version: str


@dataclass(frozen=True)
class _Expected:
    """What a folder must give: `exact` in float32 from the weights as stored, `trained` from those
    before rounding; both float32 [probes, D], cut as the folder cuts."""

    probes: Sequence[Probe]
    exact: np.ndarray
    trained: np.ndarray


def certify(
    folder: Path, embed: Embed, *, tolerance: float = TOLERANCE, reader: Reader = "auto"
) -> Certificate:
    """Compares `folder` with `embed` on `PROBES` and writes `certificate.json` into it.

    embed: (texts, 'query' | 'document') -> float32 [texts, D] of the encoder with the weights as
    stored. tolerance: largest absolute difference of an element of a unit vector, in float32.
    reader: 'auto' loads the folder in sentence-transformers where that is installed, else through
    this package.

    Raises CheckpointError when a difference is above the tolerance or the folder does not load: it
    is then renamed to `<folder>.rejected`, so that nobody takes it for good.
    """
    folder = Path(folder).absolute()
    contract = TextContract.from_dict(
        read_json(folder / OWN_FILE, required=True).get("contract", {})
    )
    probes = probes_for(contract, TextTokenizer.from_file(folder))
    truncate_dim = open_source(folder).truncate_dim
    vectors = cut(probe_vectors(embed, probes), truncate_dim)
    expected = _Expected(probes, vectors, vectors)
    with _rejecting(folder, folder):
        return _compare(folder, expected, contract, tolerance, reader)


def write_certified(
    output: Path,
    *,
    spec: ModelSpec,
    params: Mapping[str, Any],
    tokenizer_folder: Path,
    contract: TextContract,
    embed: Embed,
    embed_stored: Embed | None = None,
    storage: Storage = AS_IS,
    facts: Facts | None = None,
    tolerance: float = TOLERANCE,
    reader: Reader = "auto",
) -> Certificate | None:
    """Writes the folder and certifies it before it gets its name: `output` is absent, old or good.

    embed: the encoder as trained. embed_stored: with `storage.stored(params)`, required where that
    rounds. facts: for the model card, what is known of the training. In a run of several processes
    each must call this, since `embed` runs on all devices; process 0 alone writes, the others get
    None. Raises as `write_folder` and `certify`; the message names the first layer that differs.
    """
    output = Path(output).absolute()
    check_truncation(storage.truncate_dim, spec)
    probes = probes_for(contract, TextTokenizer.from_file(tokenizer_folder))
    trained = cut(probe_vectors(embed, probes), storage.truncate_dim)
    exact = trained
    if storage.dtype != "float32":
        if embed_stored is None:
            raise ValueError("embed_stored: needed to check weights that are rounded")
        exact = cut(probe_vectors(embed_stored, probes), storage.truncate_dim)
    if jax.process_index() != 0:
        return None
    with _staged(output) as staging:
        write_folder(
            staging,
            spec=spec,
            params=params,
            tokenizer_folder=tokenizer_folder,
            contract=contract,
            storage=storage,
        )
        certificate = _compare(
            staging,
            _Expected(probes, exact, trained),
            contract,
            tolerance,
            reader,
            lambda probe, used: _first_layer(
                spec,
                storage.stored(params),
                probe_tokens(contract, TextTokenizer.from_file(tokenizer_folder), probe),
                staging,
                with_torch=used != "arcticjax",
            ),
        )
        write_card(staging, spec, contract, certificate, facts or Facts())
        return certificate


def import_certified(
    output: Path,
    source: Source,
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    tolerance: float = TOLERANCE,
) -> Certificate:
    """Writes `source`, read from the sentence-transformers `folder`, as a folder to start from.

    The vectors that sentence-transformers gives from `folder` are those that this package must give
    from `output`. Raises as `write_certified`, and CheckpointError where sentence-transformers is
    not installed or does not load `folder`.
    """
    output = Path(output).absolute()
    probes = probes_for(source.contract, TextTokenizer.from_file(source.tokenizer_folder))
    with _staged(output) as staging, tempfile.TemporaryDirectory() as scratch:
        write_folder(
            staging,
            spec=source.spec,
            params=source.params,
            tokenizer_folder=source.tokenizer_folder,
            contract=source.contract,
            storage=Storage(shard_bytes=shard_bytes, truncate_dim=source.truncate_dim),
        )
        encoder = source.tokenizer_folder
        note = "Compared with the original folder as {} reads it."
        if is_original(read_json(encoder / "config.json", required=True)):
            note = _ORIGINAL_NOTE
            copied = _without_code(folder, encoder, staging, Path(scratch, "model"))
            folder, encoder = copied, copied / encoder.relative_to(folder)
        found = readers.torch_vectors([folder], probes)
        if found is None:
            raise CheckpointError(
                f"{source.origin}: cannot be compared with what sentence-transformers makes of it, "
                "which is not installed; install arcticjax[convert]"
            )
        theirs, vectors = found
        certificate = _compare(
            staging,
            _Expected(probes, vectors[0].exact, vectors[0].exact),
            source.contract,
            tolerance,
            "arcticjax",
            lambda probe, _: _first_layer(
                source.spec,
                source.params,
                probe_tokens(
                    source.contract, TextTokenizer.from_file(source.tokenizer_folder), probe
                ),
                encoder,
                with_torch=True,
            ),
            note.format(theirs),
        )
        write_card(staging, source.spec, source.contract, certificate, facts_of(source))
        return certificate


def _without_code(folder: Path, encoder: Path, native: Path, copy: Path) -> Path:
    """Makes `copy` of a sentence-transformers `folder` in original form, which has its encoder in
    `encoder`, with the sizes and the weights of `native`: its tokenizer, modules and prompts."""

    def left_out(place: str, names: list[str]) -> list[str]:
        return [
            name
            for name in names
            if Path(place, name).is_file()
            and (not name.endswith(_SETTINGS) or name == WEIGHTS_INDEX)
        ]

    shutil.copytree(folder, copy, ignore=left_out)
    target = copy / encoder.relative_to(folder)
    shutil.copyfile(native / "config.json", target / "config.json")
    for file in native.glob(f"{Path(WEIGHTS).stem}*"):
        (target / file.name).symlink_to(file)
    return copy


def cut(vectors: np.ndarray, truncate_dim: int | None) -> np.ndarray:
    """The first `truncate_dim` numbers (None: all) of vectors, scaled to unit length again."""
    if truncate_dim is None or truncate_dim >= vectors.shape[1]:
        return vectors
    kept = vectors[:, :truncate_dim]
    return kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-12)


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name at the end, or is moved away if refused."""
    check_replaceable(output)
    staging = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.unverified")
    try:
        with _rejecting(staging, output):
            yield staging
        sync(staging)
        move_into_place(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class _Refused(Exception):
    """Why a folder is not what it should be."""


@contextmanager
def _rejecting(folder: Path, name: Path) -> Iterator[None]:
    """Moves a refused folder to `<name>.rejected` and says so."""
    try:
        yield
    except _Refused as refused:
        rejected = name.with_name(f"{name.name}.rejected")
        move_into_place(folder, rejected)
        raise CheckpointError(
            f"{name}: the exported files are not the trained encoder: {refused}. The files were "
            f"moved to {rejected}; do not use them, and report this with its {CERTIFICATE_FILE}"
        ) from None


def _compare(
    folder: Path,
    expected: _Expected,
    contract: TextContract,
    tolerance: float,
    reader: Reader,
    first_layer: Callable[[Probe, str], str] | None = None,
    *notes: str,
) -> Certificate:
    """Compares and writes `certificate.json`. first_layer: of a probe, and of what read the
    folder, where hidden states begin to differ."""
    spec = ModelSpec.from_hf(read_json(folder / "config.json", required=True))
    notes = (*notes, *_notes(contract, spec))
    used, found, failure = "none", None, ""
    try:
        used, found = readers.folder_vectors(folder, expected.probes, reader)
        if used == "arcticjax" and reader == "auto":
            notes = (*notes, "Not loaded in sentence-transformers, which is not installed.")
    except CheckpointError as error:
        failure = str(error)
    names = [probe.name for probe in expected.probes]
    errors = np.full(len(names), np.nan)
    if found is not None and found.exact.shape == expected.exact.shape:
        errors = np.abs(found.exact - expected.exact).max(axis=1)
    elif found is not None:
        failure = (
            f"the folder gives vectors of shape {found.exact.shape}, expected "
            f"{expected.exact.shape}"
        )
    largest = float(errors.max())
    lowered = None
    if found is not None and found.as_loaded is not None and not failure:
        lowered = float(np.abs(found.as_loaded - expected.trained).max())
    if not failure and not largest <= tolerance:
        worst = int(np.argmax(np.where(np.isnan(errors), np.inf, errors)))
        failure = (
            f"vectors differ by up to {largest:.3g} ({names[worst]!r}), allowed is {tolerance:.3g}"
        )
        if first_layer is not None:
            failure += f"; {first_layer(expected.probes[worst], used)}"
    elif lowered is not None and not lowered <= BFLOAT16_TOLERANCE:
        failure = (
            f"in the lower precision of the folder vectors differ by up to {lowered:.3g}, allowed "
            f"is {BFLOAT16_TOLERANCE:.3g}; keep float32 for this model"
        )
    certificate = Certificate(
        passed=not failure,
        tolerance=tolerance,
        max_difference=largest,
        as_loaded_tolerance=None if lowered is None else BFLOAT16_TOLERANCE,
        as_loaded_difference=lowered,
        dtype=str(read_json(folder / "config.json", required=True).get("torch_dtype")),
        dimension=expected.exact.shape[1],
        reader=used,
        probes=dict(zip(names, map(float, errors), strict=True)),
        notes=notes,
        weights_sha256=digest(weight_files(folder)),
        arcticjax_version=__version__,
    )
    content = dataclasses.asdict(certificate)
    if not np.isfinite(largest):  # JSON has no NaN
        content |= {"max_difference": None, "probes": dict.fromkeys(names)}
    write_json(folder / CERTIFICATE_FILE, content)
    if failure:
        raise _Refused(f"{failure} (read by {used})")
    return certificate


def _notes(contract: TextContract, spec: ModelSpec) -> tuple[str, ...]:
    notes = []
    if contract.query_length != contract.document_length:
        side = "query" if contract.query_length < contract.document_length else "document"
        shorter = min(contract.query_length, contract.document_length)
        notes.append(
            f"In training a {side} was cut to {shorter} tokens. This folder cuts only at "
            f"{max(contract.query_length, contract.document_length)}, so a longer {side} gives "
            "another vector here; no such text was compared."
        )
    beyond = spec.rotary and spec.rotary.trained_positions
    if beyond and max(contract.query_length, contract.document_length) > beyond:
        notes.append(
            f"PyTorch scales rotary positions by the longest text of a batch, once that has more "
            f"than {beyond} tokens, the encoder as trained by each text: such texts were compared "
            "one at a time, and in a batch beside longer ones have other vectors there."
        )
    return tuple(notes)


def _first_layer(
    spec: ModelSpec,
    params: Mapping[str, Any],
    tokens_S: np.ndarray,
    folder: Path,
    *,
    with_torch: bool,
) -> str:
    """Where the hidden states of a text in `folder` leave those of `params`, in words."""
    try:
        theirs = readers.torch_states(folder, tokens_S) if with_torch else None
        if theirs is None:
            other = open_source(folder)
            theirs = layers.states(other.spec, other.params, tokens_S)
        place = layers.first_difference(layers.states(spec, params, tokens_S), theirs)
    except CheckpointError as error:
        return f"its layers cannot be compared: {error}"
    if place is None:
        return "no layer differs, so prompt, tokens, length, pooling or size of the vector do"
    return f"the first to differ is {place}"
