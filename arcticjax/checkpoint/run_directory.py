"""Where a run keeps what it makes, and who may write there."""

from __future__ import annotations

import errno
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from arcticjax.buckets import Bucket, folder_here
from arcticjax.checkpoint import identity, mirror
from arcticjax.checkpoint.disk import is_disk_full, require_free
from arcticjax.checkpoint.lease import HEARTBEAT_SECONDS, STALE_SECONDS, Lease, claim
from arcticjax.checkpoint.lock import Lock
from arcticjax.checkpoint.lock_file import LockFile
from arcticjax.checkpoint.lock_object import LockObject
from arcticjax.errors import ArcticError, ConfigError, ResourceError, StoreError

_NOT_A_DIRECTORY = (errno.ENOTDIR, errno.EEXIST)
_BAD_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
# config, metrics, plots and the probe: what a run needs beside its checkpoints.
_SMALL_FILES = 1 << 20
_PROBE_BYTES = 1 << 12
_log = logging.getLogger(__name__)


class RunDirectory:
    """The paths of a run; making one touches no disk.

    In a run of several processes only process 0 claims; the others just use the paths.

    place: what messages call it. bucket: where the run is kept, if not on a disk; `path` is then
    this process's own folder, in the user's cache, for files on their way there and back.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        text = os.fspath(path)
        if not text.strip():
            raise ConfigError("run.directory is empty: name the directory that this run writes to")
        self.bucket: Bucket | None = None
        if "://" in text:
            self.bucket = Bucket(text, "run.directory")
            text = os.fspath(folder_here(text) / f"process-{_rank()}")
        self.path = epath.Path(os.path.abspath(os.path.expanduser(text)))
        self._mirror: mirror.Mirror | None = None
        self.place = os.fspath(self.path) if self.bucket is None else self.bucket.address
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.lock_file = self.path / "run.lock"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report"

    def __repr__(self) -> str:
        return f"RunDirectory({self.place!r})"

    @property
    def checkpoint_bucket(self) -> Bucket | None:
        """Where the checkpoints are kept, if not on a disk."""
        return None if self.bucket is None else self.bucket.below(self.checkpoints.name)

    def create(self) -> None:
        """Makes the directories and proves that they can be read and written.

        Raises ConfigError when the path is or runs through a file or cannot be a path,
        ResourceError when it is not readable or writable or the disk has no room even for the small
        files of a run; room for checkpoints is `CheckpointStore.require_room`'s.
        """
        if self.bucket is not None:
            probe(self.bucket)
        with self._explain():
            for directory in (self.path, self.checkpoints, self.report):
                directory.mkdir(parents=True, exist_ok=True)
                os.listdir(directory)
            for directory in (self.path, self.checkpoints):
                _write_through(directory / f".probe-{uuid.uuid4().hex}", "probe\n").unlink()
            self.metrics_file.touch(exist_ok=True)
        require_free(self.path, _SMALL_FILES, "the run")

    def claim(
        self,
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ) -> Lease:
        """Creates the directory and takes its lease; use as `with directory.claim():`.

        Raises what `create` raises, and ConfigError naming host and process id when another run
        holds the directory.
        """
        self.create()
        lock: Lock = LockFile(Path(self.lock_file))
        if self.bucket is not None:
            lock = LockObject(self.bucket, self.lock_file.name)
        with self._explain():
            return claim(lock, heartbeat_seconds=heartbeat_seconds, stale_seconds=stale_seconds)

    def bring(self, names: Iterable[str]) -> None:
        """Where the run is kept in a bucket, makes these files of `path` what they are there, and
        removes all others but checkpoints."""
        if self.bucket is None:
            return
        with self._explain():
            self.path.mkdir(parents=True, exist_ok=True)
            for path in self.path.iterdir():
                if path.is_dir() and path != self.checkpoints:
                    path.rmtree()
                elif not path.is_dir():
                    path.unlink()
            self.report.mkdir(exist_ok=True)
        mirror.bring(self.bucket, Path(self.path), names)

    @contextmanager
    def mirrored(self, check: Callable[[], None], last: str) -> Iterator[None]:
        """Where the run is kept in a bucket, keeps the files of `path` there until the end of the
        block. check: raises where the lease was lost; last: see `Mirror`."""
        if self.bucket is None:
            yield
            return
        left_out = (self.checkpoints.name, self.lock_file.name)
        with mirror.Mirror(Path(self.path), self.bucket, check, left_out, last) as found:
            self._mirror = found
            yield

    def publish(self) -> None:
        """Brings the bucket up to date, if the run is in one and `mirrored`."""
        if self._mirror is not None:
            self._mirror.flush()

    def identify(self) -> identity.Identity:
        """Notes in `run.json` which run this is, and gives it: another than before in a copy of a
        directory that is still there."""
        directory = Path(self.path)
        here = os.path.realpath(directory) if self.bucket is None else self.place
        before, found = identity.read(directory), identity.identify(directory, here)
        if before is not None and found.copied_from == before.id:
            _log.warning(
                "run.directory %s is a copy of %s, which is still there: it goes on as run %s of "
                "its own", found.directory, before.directory, found.id,
            )  # fmt: skip
        self._replace(identity.IDENTITY_FILE, identity.to_json(found))
        return found

    def write_config(self, text: str) -> None:
        """Writes `config.yaml` whole or not at all."""
        self._replace(self.config_file.name, text)

    def read_config(self) -> str | None:
        """The text of `config.yaml`, or None in a directory where no run has begun."""
        with self._explain():
            return self.config_file.read_text() if self.config_file.exists() else None

    def _replace(self, name: str, text: str) -> None:
        with self._explain():
            temporary = self.path / f".{name}-{uuid.uuid4().hex}.tmp"
            _write_through(temporary, text).replace(self.path / name)

    @contextmanager
    def _explain(self) -> Iterator[None]:
        try:
            yield
        except ArcticError:
            raise
        except (OSError, ValueError) as error:
            name = os.fspath(self.path)
            code = getattr(error, "errno", None)
            if is_disk_full(error):
                raise ResourceError(
                    f"run.directory {name}: the disk is full; free some space or use another disk"
                ) from None
            place = getattr(error, "filename", None) or name
            if code in _NOT_A_DIRECTORY:
                raise ConfigError(
                    f"run.directory {name}: {_file_on_the_way(os.fspath(place))} is not a "
                    "directory; move it away or set another run.directory"
                ) from None
            if code in _BAD_NAME or not isinstance(error, OSError):
                raise ConfigError(
                    f"run.directory {name!r} cannot be a directory: {error}"
                ) from None
            raise ResourceError(
                f"run.directory {name} cannot be read and written: {error.strerror or error} "
                f"({place}); change its permissions or set another run.directory"
            ) from None


def probe(bucket: Bucket) -> None:
    """Proves that objects can be written, read and deleted; raises StoreError."""
    name, content = f".probe-{uuid.uuid4().hex}", os.urandom(_PROBE_BYTES)
    bucket.write(name, content)
    if bucket.read(name) != content:
        raise StoreError(f"{bucket.address}: gives back other bytes than were written")
    bucket.delete([name])


def _rank() -> int:
    from arcticjax.parallel import distributed  # imports jax, which few tools here need

    return distributed.rank()


def _write_through(path: epath.Path, text: str) -> epath.Path:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return path


def _file_on_the_way(path: str) -> str:
    """The part of a path that exists and is no directory (the whole path when none is found)."""
    place = path
    while place != os.path.dirname(place):
        if os.path.lexists(place) and not os.path.isdir(place):
            return place
        place = os.path.dirname(place)
    return path
