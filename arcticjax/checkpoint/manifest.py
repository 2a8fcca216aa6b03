"""The list of files, sizes and hashes that makes a checkpoint step trustworthy.

The array store notices neither a flipped bit nor a lost file, so each step directory holds a
MANIFEST.json, written last and fsynced before the step is committed. A step is good only if every
file in it has the size and SHA-256 that the manifest states; the manifest carries its own hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from etils import epath

from arcticjax.checkpoint.leaves import Leaf

FILE_NAME = "MANIFEST.json"
_FORMAT = 1
_BLOCK = 1 << 20
_THREADS = 4
# Written by Orbax after the manifest, and read by nobody: a damaged one costs nothing.
_NOT_LISTED = frozenset({FILE_NAME, "_CHECKPOINT_METADATA", "commit_success.txt"})


@dataclass(frozen=True)
class Problem:
    """Why a step is not good: a slug for its new directory name, the file, and what is wrong."""

    reason: str
    file: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}: {self.detail}"


class TornStep(Exception):
    """The manifest of a step is missing or cannot be believed."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hexadecimal) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a step directory holds: leaves by path, and files by path relative to the step."""

    step: int
    leaves: Mapping[str, Leaf]
    files: Mapping[str, FileEntry]


def write_manifest(directory: epath.Path, step: int, leaves: Mapping[str, Leaf]) -> Manifest:
    """Hashes and fsyncs every file below `directory`, then writes and fsyncs the manifest."""
    manifest = Manifest(step, dict(leaves), describe_files(directory, sync=True))
    path = directory / FILE_NAME
    path.write_text(encode_manifest(manifest))
    for target in (path, *_directories(directory)):
        sync_to_disk(target)
    return manifest


def describe_files(directory: epath.Path, *, sync: bool = False) -> dict[str, FileEntry]:
    """Sizes and hashes of all files of a step, which are brought to the disk before if `sync`."""
    names = sorted(list_files(directory))
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = pool.map(lambda name: describe_file(directory / name, sync=sync), names)
        return dict(zip(names, entries, strict=True))


def read_manifest(directory: epath.Path, step: int) -> Manifest:
    """Reads the manifest of a step; raises TornStep when it is missing or cannot be believed."""
    try:
        data = (directory / FILE_NAME).read_bytes()
    except FileNotFoundError:
        raise TornStep(
            Problem("missing-manifest", FILE_NAME, "is missing, so the step cannot be verified")
        ) from None
    except OSError as error:
        raise TornStep(Problem("unreadable-manifest", FILE_NAME, str(error))) from None
    return decode_manifest(data, step)


def decode_manifest(data: bytes, step: int) -> Manifest:
    """The manifest of a step from its file's content; raises TornStep as `read_manifest` does."""
    try:
        manifest = _decode(data)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise TornStep(
            Problem("unreadable-manifest", FILE_NAME, "is damaged (its own hash does not match)")
        ) from None
    if manifest.step != step:
        raise TornStep(
            Problem("wrong-step", FILE_NAME, f"belongs to step {manifest.step}, not {step}")
        )
    return manifest


def check_files(
    directory: epath.Path, manifest: Manifest, *, hashes: bool = True, part: int = 0, parts: int = 1
) -> Problem | None:
    """Compares files with the manifest and returns the first problem, or None.

    All sizes are compared before any hash. With `parts` > 1 only every `parts`-th file by size is
    hashed, starting with `part`, so that several processes share the work.
    """
    for name, entry in manifest.files.items():
        problem = _check_size(directory, name, entry)
        if problem is not None:
            return problem
    if not hashes:
        return None
    by_size = sorted(manifest.files.items(), key=lambda item: (-item[1].size, item[0]))
    with ThreadPoolExecutor(_THREADS) as pool:
        problems = pool.map(lambda item: _check_hash(directory, *item), by_size[part::parts])
        return next((problem for problem in problems if problem is not None), None)


def sync_to_disk(path: epath.Path) -> None:
    """Flushes a file or directory to the disk; other storage than POSIX commits by itself."""
    if not isinstance(path, os.PathLike) or "://" in os.fspath(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_size(directory: epath.Path, name: str, entry: FileEntry) -> Problem | None:
    try:
        size = (directory / name).stat().length
    except FileNotFoundError:
        return Problem("missing-file", name, "is missing")
    except OSError as error:
        return Problem("unreadable-file", name, str(error))
    if size != entry.size:
        return Problem("wrong-size", name, f"has {size:,} bytes instead of {entry.size:,}")
    return None


def _check_hash(directory: epath.Path, name: str, entry: FileEntry) -> Problem | None:
    try:
        found = describe_file(directory / name)
    except OSError as error:
        return Problem("unreadable-file", name, str(error))
    if found != entry:
        return Problem("wrong-hash", name, "has other content than was written (SHA-256 differs)")
    return None


def describe_file(path: epath.Path, *, sync: bool = False) -> FileEntry:
    """Size and hash of one file."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    if sync:
        sync_to_disk(path)
    return FileEntry(size, digest.hexdigest())


def list_files(directory: epath.Path, prefix: str = "") -> Iterable[str]:
    """Names of the files below a step that a manifest lists."""
    for path in directory.iterdir():
        name = prefix + path.name
        if path.is_dir():
            yield from list_files(path, name + "/")
        elif name not in _NOT_LISTED:
            yield name


def _directories(directory: epath.Path) -> Iterable[epath.Path]:
    for path in directory.iterdir():
        if path.is_dir():
            yield from _directories(path)
    yield directory


def encode_manifest(manifest: Manifest) -> str:
    content = {
        "format": _FORMAT,
        "step": manifest.step,
        "leaves": {
            name: {"shape": list(leaf.shape), "dtype": leaf.dtype}
            for name, leaf in manifest.leaves.items()
        },
        "files": {
            name: {"size": entry.size, "sha256": entry.sha256}
            for name, entry in manifest.files.items()
        },
    }
    return json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n"


def _decode(data: bytes) -> Manifest:
    content = json.loads(data.decode("utf-8"))
    if content.pop("sha256") != _digest(content) or content["format"] != _FORMAT:
        raise ValueError("not a manifest")
    return Manifest(
        step=content["step"],
        leaves={
            name: Leaf(tuple(leaf["shape"]), leaf["dtype"])
            for name, leaf in content["leaves"].items()
        },
        files={
            name: FileEntry(entry["size"], entry["sha256"])
            for name, entry in content["files"].items()
        },
    )


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
