"""A run's records, one JSON object per line with its `step`, that survive a kill in mid-line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arcticjax.errors import ResourceError

REJECTED_SUFFIX = ".rejected"


def to_json_line(record: Mapping[str, Any]) -> str:
    """Writes one object as strict JSON: a NaN or infinity becomes null.

    What was lost stands under `non_finite`, dotted path -> "nan" | "inf" | "-inf", so a reader can
    tell it from an absent value. NumPy and jax scalars are written as numbers.
    Raises TypeError for a value that has no JSON form.
    """
    lost: dict[str, str] = {}
    plain = {str(key): _plain(value, str(key), lost) for key, value in record.items()}
    if lost:
        plain["non_finite"] = lost
    return json.dumps(plain, allow_nan=False)


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Reads a file's records and, apart, the lines that are none: torn, binary or foreign.

    A record is a JSON object with an integer `step` >= 0. A file that does not exist has neither.
    Raises ResourceError if it cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise ResourceError(f"cannot read {path}: {error.strerror or error}") from error
    records, rejected = [], []
    for line in content.split(b"\n"):
        if not line.strip():
            continue
        record = _record(line)
        if record is None:
            rejected.append(line)
        else:
            records.append(record)
    return records, rejected


class JsonLines:
    """Appends whole lines to one file, after what an earlier run wrote up to a step.

    kept: the earlier records that stay, in file order. dropped: how many lay after the step.
    rejected: how many lines were no record; they move to `<name>.rejected` beside the file, so
    that nothing foreign is destroyed.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        """Opens for appending, after an atomic rewrite if anything has to go.

        last_step: records of later steps are dropped; the resumed run writes them again.
        Raises ResourceError if the file cannot be read or written.
        """
        self.path = path
        records, rejected = read_json_lines(path)
        self.kept = [record for record in records if record["step"] <= last_step]
        self.dropped = len(records) - len(self.kept)
        self.rejected = len(rejected)
        try:
            if rejected:
                with path.with_name(path.name + REJECTED_SUFFIX).open("ab") as aside:
                    aside.writelines(line + b"\n" for line in rejected)
            content = "".join(to_json_line(record) + "\n" for record in self.kept).encode()
            if self.dropped or rejected or (records and not _ends_in_newline(path)):
                write_atomically(path, content)
            self._file = path.open("ab")
        except OSError as error:
            raise self._unwritable(error) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line and hands it to the system. Raises ResourceError if that fails."""
        line = to_json_line(record) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Closes the file; harmless when repeated, and after a failed append."""
        try:
            self._file.close()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> ResourceError:
        return ResourceError(
            f"cannot write {self.path}: {error.strerror or error}; "
            "free disk space or make the folder writable, then run the same command to resume"
        )


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file so that a reader sees the old or the new content, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    step = record.get("step")
    return record if type(step) is int and step >= 0 else None


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _plain(value: Any, where: str, lost: dict[str, str]) -> Any:
    if hasattr(value, "tolist"):  # NumPy and jax arrays and scalars
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        lost[where] = str(value)
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}", lost) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}.{i}", lost) for i, v in enumerate(value)]
    return value
