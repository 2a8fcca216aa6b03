"""Files of a source while it is written: shards, sidecars, the folder they grow in."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from arcticjax.data import record_format

# One record a group: a random read then touches that record only, and Grain and TFDS expect it.
_WRITER_OPTIONS = "group_size:1,uncompressed"

_log = logging.getLogger(__name__)


def temporary_folder(directory: Path) -> Path:
    """A new folder beside `directory`; what killed writers left there is removed."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(directory)
    prefix = f"{_temporary_prefix(directory)}{os.getpid()}-"
    return Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent))


def remove_abandoned(directory: Path) -> None:
    """Deletes what killed writers left: their process is gone, nothing written for 10 minutes.

    The second condition protects writers in other containers that go by the same host name.
    """
    prefix = _temporary_prefix(directory)
    for folder in directory.parent.glob(f"{prefix}*"):
        process = folder.name.removeprefix(prefix).partition("-")[0]
        if not process.isdigit() or Path(f"/proc/{process}").exists() or not Path("/proc").exists():
            continue
        try:
            newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
        except OSError:
            continue
        if time.time() - newest > 600:
            _log.warning("removing %s, left by a writer that was killed", folder)
            shutil.rmtree(folder, ignore_errors=True)


def file_facts(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, after forcing it to disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def sync(path: Path) -> None:
    """Forces a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_prefix(directory: Path) -> str:
    return f".{directory.name}.{socket.gethostname()}-"


class ShardWriter:
    """Writes records to ArrayRecord files of about `shard_bytes` each.

    `rename` gives them their names when their number is known.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.records: list[int] = []
        self.total_bytes = 0
        self.digest = hashlib.sha256()
        self._writer: Any = None
        self._room = 0

    def add(self, record: bytes) -> None:
        if self._room <= 0:
            self.close()
            path = self.folder / f"shard-{len(self.records)}"
            self._writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)
            self._room = self.shard_bytes
            self.records.append(0)
        self._call(self._writer.write, record)
        self.digest.update(record)
        self.records[-1] += 1
        self.total_bytes += len(record)
        self._room -= len(record)

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            self._call(writer.close)

    def rename(self) -> list[str]:
        names = [
            record_format.shard_name(shard, len(self.records)) for shard in range(len(self.records))
        ]
        for shard, name in enumerate(names):
            (self.folder / f"shard-{shard}").rename(self.folder / name)
        return names

    def _call(self, function: Any, *arguments: Any) -> None:
        """The library reports every fault of the disk as RuntimeError with the system's words."""
        try:
            function(*arguments)
        except RuntimeError as error:
            raise OSError(errno.EIO, str(error)) from error


class SidecarWriter:
    """Writes a one-dimensional `.npy` file of unknown length, its header last."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.count = 0
        self._file = path.open("wb")
        self._header()

    def add(self, values: Any) -> None:
        self._file.write(np.array(values, self.dtype).tobytes())
        self.count += len(values)

    def close(self) -> None:
        if self._file.closed:
            return
        # NumPy pads the header for any length that axis 0 may grow to, so it keeps its size.
        try:
            self._file.seek(0)
            self._header()
        finally:
            self._file.close()

    def _header(self) -> None:
        facts = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.count,),
        }
        np.lib.format.write_array_header_1_0(self._file, facts)
