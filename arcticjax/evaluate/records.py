"""What one task scored, kept as it is finished, so that a killed evaluation goes on from there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcticjax.errors import ResourceError

FOLDER = "tasks"
# Records of another version are not read.
VERSION = 1


@dataclass(frozen=True)
class Identity:
    """What a score is of: it stands for no other. revision: the encoder's fingerprint. data: that
    of the task's texts and judgements."""

    task: str
    revision: str
    data: str
    compressions: list[str]


@dataclass(frozen=True)
class Record:
    """metrics: by name, in [0, 1]. values: part of the task (its split and subset) -> compression
    -> nDCG@10 of each query; empty for a task that is no retrieval. seconds: with loading the data.
    """

    identity: Identity
    metrics: dict[str, float]
    values: dict[str, dict[str, list[float]]]
    documents: int
    queries: int
    seconds: float


def prepare(output: Path) -> None:
    """Makes the folder of records; ResourceError, before any task, if it cannot be written."""
    probe = output / FOLDER / ".writable"
    write_bytes(probe, b"")
    probe.unlink(missing_ok=True)  # another evaluation may use the folder


def read(output: Path, identity: Identity) -> Record | None:
    """The record of a finished task; None if there is none of this identity."""
    try:
        stored = json.loads(_file(output, identity.task).read_text(encoding="utf-8"))
        if stored.pop("version") != VERSION:
            return None
        record = Record(**{**stored, "identity": Identity(**stored["identity"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # torn or foreign: the task is scored again
    return record if record.identity == identity else None


def write(output: Path, record: Record) -> None:
    """Keeps a record, whole or not at all."""
    content = {"version": VERSION, **dataclasses.asdict(record)}
    write_json(_file(output, record.identity.task), content)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file in one move; ResourceError if it cannot be."""
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file in one move; ResourceError if it cannot be."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be written: {error.strerror or error}; free disk space or name "
            "another --output, then run the same command again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _file(output: Path, task: str) -> Path:
    plain = re.sub(r"[^\w.-]", "_", task)
    # Two names may look alike when plain.
    mark = "" if plain == task else f"-{zlib.crc32(task.encode()):08x}"
    return output / FOLDER / f"{plain}{mark}.json"
