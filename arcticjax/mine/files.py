"""Files of a mining run, which appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from arcticjax.checkpoint.disk import is_disk_full
from arcticjax.data import record_files
from arcticjax.errors import ResourceError


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns a failed write of `path` into a ResourceError that says what to do."""
    try:
        yield
    except OSError as error:
        why = "the disk is full" if is_disk_full(error) else error.strerror or str(error)
        raise ResourceError(
            f"output: {path} cannot be written ({why}); what was written before is intact. Free "
            "some space, or mend the folder's permissions, and give the same command again"
        ) from error


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file beside its place, forces it to disk, and renames it; leaves nothing where that
    fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    with explained(path):
        try:
            with temporary.open("wb") as file:
                write(file)
            record_files.sync(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        record_files.sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
