"""Keeps the small files of a run in a bucket as they are in its local directory.

Training never waits for it: what changed is uploaded every few seconds by a thread, and the rest at
the end. A store that is away meanwhile is told of once and asked again; at the end it is an error.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from arcticjax.buckets import Bucket
from arcticjax.errors import ArcticError, ResourceError, StoreError

SECONDS = 15.0
# Larger ones are written once and not appended to, so that they can be read while they are sent.
_SMALL = 64 << 20
_log = logging.getLogger(__name__)


class Mirror:
    """While entered, uploads what changes below `directory`; leaving uploads the rest.

    check: raises ArcticError where nothing may be uploaded any more. left_out: folders and files of
    `directory` that are not mirrored; nor are hidden ones. last: a file that is uploaded after all
    others, so that who sees it sees them.
    """

    def __init__(
        self,
        directory: Path,
        bucket: Bucket,
        check: Callable[[], None],
        left_out: Sequence[str],
        last: str,
    ) -> None:
        self._directory, self._bucket, self._check = directory, bucket, check
        self._left_out, self._last = frozenset(left_out), last
        self._sent: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._told = False
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: Any) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self.flush()
        except ArcticError as failure:
            if kind is None:
                raise
            # The error under way says more.
            _log.warning("%s", failure)

    def flush(self) -> None:
        """Uploads all that changed; raises StoreError where the store does not take it, and what
        `check` raises."""
        with self._lock:
            for name, state in self._changed():
                self._check()
                path = self._directory / name
                try:
                    content = path if state[1] > _SMALL else path.read_bytes()
                except FileNotFoundError:  # a temporary one
                    continue
                self._bucket.write(name, content)
                self._sent[name] = state

    def _run(self) -> None:
        while not self._stop.wait(SECONDS):
            try:
                self.flush()
            except StoreError as error:
                if not self._told:
                    _log.warning("%s; training goes on, and this is tried again", error)
                self._told = True
            except ArcticError:
                return  # the run will notice by itself
            else:
                if self._told:
                    _log.warning("%s has the files of the run again", self._bucket.address)
                self._told = False

    def _changed(self) -> list[tuple[str, tuple[int, int]]]:
        """Files by name, and when they changed (ns) and how large they are."""
        found = []
        for path in self._files(self._directory):
            name = path.relative_to(self._directory).as_posix()
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            state = (stat.st_mtime_ns, stat.st_size)
            if self._sent.get(name) != state:
                found.append((name, state))
        return sorted(found, key=lambda one: (one[0] == self._last, one[0]))

    def _files(self, folder: Path) -> Iterator[Path]:
        found: list[Path] = []
        with contextlib.suppress(FileNotFoundError):  # a temporary one
            found = list(folder.iterdir())
        for path in found:
            if path.name.startswith(".") or path.name.endswith(".tmp"):
                continue
            if folder == self._directory and path.name in self._left_out:
                continue
            if path.is_dir():
                yield from self._files(path)
            else:
                yield path


def bring(bucket: Bucket, directory: Path, names: Iterable[str]) -> None:
    """Makes files of a directory what they are in the bucket; those that are not there go.

    Raises StoreError, and ResourceError where they cannot be written here.
    """
    for name in names:
        path = directory / name
        try:
            content = bucket.read(name)
        except FileNotFoundError:
            path.unlink(missing_ok=True)
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise ResourceError(
                f"{path}: cannot be written ({error.strerror or error}); free disk space or set "
                "XDG_CACHE_HOME to a folder on another disk, then run the same command again"
            ) from None
