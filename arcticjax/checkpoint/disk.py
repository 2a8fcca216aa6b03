"""Room on a disk, and plain words for a failed write."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from arcticjax.errors import ArcticError, ResourceError, StoreError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("No space left", "ENOSPC", "quota exceeded", "EDQUOT")


def free_bytes(path: os.PathLike[str] | str) -> int | None:
    """Bytes free for this user on the disk that holds `path` (or its nearest existing parent).

    None where that cannot be found out.
    """
    place = os.path.abspath(os.fspath(path))
    while not os.path.exists(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def require_free(path: os.PathLike[str] | str, needed: int, what: str) -> None:
    """Raises ResourceError when fewer than `needed` bytes are free where `path` lies."""
    free = free_bytes(path)
    if free is not None and free < needed:
        raise ResourceError(_full_message(path, what, needed, free))


@contextmanager
def explain_write_failure(
    path: os.PathLike[str] | str, what: str, needed: int | None
) -> Iterator[None]:
    """Turns any failure of a write into one ResourceError that says what could not be written."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ArcticError) and not isinstance(error, StoreError):
            raise
        if is_disk_full(error):
            message = _full_message(path, what, needed, free_bytes(path))
            raise ResourceError(message) from None
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ResourceError(
            f"{what} could not be written to {path} (run.directory): {lines[0][:300]}"
        ) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, says that the disk or the quota is used up."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error)
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(mark in text for mark in _FULL_TEXTS):
            return True
        if text.startswith("RESOURCE_EXHAUSTED: Error writing"):
            return True
        error = error.__cause__ or error.__context__
    return False


def _full_message(
    path: os.PathLike[str] | str, what: str, needed: int | None, free: int | None
) -> str:
    room = "an unknown number of" if free is None else f"{free:,}"
    need = "more" if needed is None else f"{needed:,} bytes"
    return (
        f"no room for {what} on the disk of {path} (run.directory): {need} needed, {room} bytes "
        "free. Files written earlier are intact. Free some space, keep fewer checkpoints "
        "(checkpoint.keep), or use a run.directory on another disk"
    )
