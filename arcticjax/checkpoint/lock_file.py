"""A lock in a file, read and changed only under `flock`, so that two claims cannot both win.

The heartbeat is the file's modification time, compared with the time of a file written beside it,
so that clocks of different hosts do not matter and a full disk does not stop it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from arcticjax.checkpoint.lock import Held, Owner, decode, encode


class LockFile:
    """The lock in a file, which need not exist; see `Lock`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def place(self) -> str:
        return str(self.path.parent)

    @property
    def name(self) -> str:
        return self.path.name

    @contextlib.contextmanager
    def hold(self, *, create: bool) -> Iterator[Held]:
        """Opens the file and holds its `flock` until the end of the block."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
            try:
                # Where flock is not supported (some network disks) the heartbeat alone decides.
                with contextlib.suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                # The file may have been released (unlinked) while this process waited.
                if _is_same_file(descriptor, self.path):
                    yield _HeldFile(descriptor, self.path)
                    return
            finally:
                os.close(descriptor)


class _HeldFile:
    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path = descriptor, path
        self.owner = decode(os.pread(descriptor, 1 << 16, 0))
        self.heartbeat = os.fstat(descriptor).st_mtime

    def age(self) -> float:
        return _now(self._path) - self.heartbeat

    def take(self, me: Owner) -> bool:
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, encode(me), 0)
        os.fsync(self._descriptor)
        return True

    def beat(self) -> bool:
        os.utime(self._descriptor)
        return True

    def free(self) -> None:
        self._path.unlink()


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _now(path: Path) -> float:
    """The time as the file system counts it (seconds)."""
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)
