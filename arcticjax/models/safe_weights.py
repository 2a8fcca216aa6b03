"""Reads safetensors files from strangers: every offset is checked before a byte of weights is used.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the
tensors' bytes. Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from arcticjax.errors import CheckpointError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

MAX_HEADER_BYTES = 16 * 2**20
MAX_INDEX_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
MAX_RANK = 8

# Float weights, and the integer buffers that old exports carry beside them.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
}

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".npz")


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor lies in its file: `begin` and `end` count bytes from the start of the
    file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: one file, or the shards that its index names.

    Raises CheckpointError when there are none (with the way to convert a pickle, which is never
    opened), or when the index names a file that is missing or outside the folder.
    """
    single = folder / WEIGHTS
    if single.is_file():
        return [single]
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        return [folder / name for name in _shard_names(index)]
    unsafe = sorted(
        path.name for path in folder.iterdir() if path.suffix.lower() in _UNSAFE_SUFFIXES
    )
    if unsafe:
        raise CheckpointError(
            f"{folder}: the weights are only in {', '.join(unsafe)}, which can run code when "
            f"opened and so is not opened. Convert them once in an environment you trust, "
            f'`python -c "from transformers import AutoModel; AutoModel.from_pretrained('
            f"'{folder}').save_pretrained('{folder}')\"`, or use a revision of the model that has "
            f"{WEIGHTS}"
        )
    raise CheckpointError(
        f"{folder}: no {WEIGHTS} and no {WEIGHTS_INDEX}; model.init must name a folder in Hugging "
        f"Face or sentence-transformers form"
    )


def read_weights(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """All tensors of `files` by name: floats as float32, integers as stored; the arrays own their
    memory.

    Raises CheckpointError for a malformed file, a tensor in two files, or a weight that is not
    finite.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in files:
        places = read_header(path)
        repeated = sorted(set(places) & set(tensors))
        if repeated:
            raise CheckpointError(f"{path}: tensor {repeated[0]!r} is also in another shard")
        if all(math.prod(place.shape) == 0 for place in places.values()):
            raise CheckpointError(f"{path}: no weights inside")
        data = np.memmap(path, dtype=np.uint8, mode="r")
        for name, place in places.items():
            raw = data[place.begin : place.end].view(place.dtype).reshape(place.shape)
            if np.issubdtype(place.dtype, np.integer):
                tensors[name] = np.array(raw)
                continue
            with np.errstate(over="ignore"):  # float64 beyond float32: seen as infinity below
                tensors[name] = np.array(raw, dtype=np.float32)
            if not np.isfinite(tensors[name]).all():
                raise CheckpointError(
                    f"{path}: tensor {name!r} holds NaN or infinity (or overflows float32); "
                    f"the weights are damaged, fetch them again"
                )
    return tensors


def read_header(path: Path) -> dict[str, TensorPlace]:
    """The tensors that `path` declares, checked: known dtypes, and byte ranges that tile the data
    exactly.

    Raises CheckpointError saying what is wrong. Nothing is allocated on the word of the file: the
    header length is capped and compared with the file's size first.
    """
    size = path.stat().st_size
    if size < 8:
        raise CheckpointError(f"{path}: truncated, {size} bytes; fetch the file again")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: the header claims {length} bytes, more than the {MAX_HEADER_BYTES} "
                f"allowed; this is not a safetensors file of an encoder"
            )
        if 8 + length > size:
            raise CheckpointError(
                f"{path}: truncated, the header alone needs {8 + length} bytes and the file has "
                f"{size}; fetch the file again"
            )
        raw = file.read(length)
    header = _parse_json(raw, path, "header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path}: {len(header)} tensors, more than the {MAX_TENSORS} allowed")
    places = {name: _place(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_tiling(path, places, 8 + length, size)
    return places


def digest(files: Sequence[Path]) -> str:
    """SHA-256 in hex: of the file itself when there is one, of 'name digest' lines for shards."""
    if len(files) == 1:
        return _file_digest(files[0])
    lines = "".join(f"{path.name} {_file_digest(path)}\n" for path in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shard_names(index: Path) -> list[str]:
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{index}: larger than {MAX_INDEX_BYTES} bytes")
    content = _parse_json(index.read_bytes(), index, "index")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index}: 'weight_map' is missing or empty")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if not _SHARD_NAME.fullmatch(name):
            raise CheckpointError(
                f"{index}: {name!r} is not a plain *.safetensors file name in the same folder"
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: shard {name} is missing; fetch the model again")
    return names


def _place(path: Path, name: str, entry: Any, data_start: int) -> TensorPlace:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{where}: dtype {entry['dtype']!r} is not supported; allowed are {', '.join(DTYPES)}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _whole_numbers(shape) or len(shape) > MAX_RANK:
        raise CheckpointError(f"{where}: shape {shape!r} is not a list of whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets {offsets!r} is not [begin, end]")
    needed = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"{where}: {entry['dtype']} {shape} needs {needed} bytes, data_offsets {offsets} give "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorPlace(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _check_tiling(
    path: Path, places: Mapping[str, TensorPlace], data_start: int, size: int
) -> None:
    """The tensors must cover the data area with no overlap and no hole, as the format demands."""
    reached, before = data_start, "the header"
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.end > size:
            raise CheckpointError(
                f"{path}: tensor {name!r} ends at byte {place.end}, the file has {size}; it is "
                f"truncated or its offsets are out of range: fetch the file again"
            )
        if place.begin != reached:
            fault = "overlaps" if place.begin < reached else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {name!r} {fault} {before}; the file is malformed"
            )
        reached, before = place.end, f"tensor {name!r}"
    if reached != size:
        raise CheckpointError(
            f"{path}: {size - reached} bytes after the last tensor belong to none"
        )


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _parse_json(raw: bytes, path: Path, what: str) -> Any:
    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=no_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the {what} is not valid JSON: {error}") from None
