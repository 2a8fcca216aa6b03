"""Where a run keeps what it makes, and who may write there."""

from __future__ import annotations

import errno
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from arcticjax.checkpoint import identity
from arcticjax.checkpoint.disk import is_disk_full, require_free
from arcticjax.checkpoint.lease import HEARTBEAT_SECONDS, STALE_SECONDS, Lease, claim
from arcticjax.checkpoint.lock_file import LockFile
from arcticjax.errors import ConfigError, ResourceError

_NOT_A_DIRECTORY = (errno.ENOTDIR, errno.EEXIST)
_BAD_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
# config, metrics, plots and the probe: what a run needs beside its checkpoints.
_SMALL_FILES = 1 << 20
_log = logging.getLogger(__name__)


class RunDirectory:
    """The paths of a run; making one touches no disk.

    In a run of several processes only process 0 claims; the others just use the paths.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        text = os.fspath(path)
        if not text.strip():
            raise ConfigError("run.directory is empty: name the directory that this run writes to")
        if "://" in text:
            raise ConfigError(
                f"run.directory {text}: buckets are not supported yet; name a directory on a disk "
                "that all processes share"
            )
        self.path = epath.Path(os.path.abspath(os.path.expanduser(text)))
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.lock_file = self.path / "run.lock"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report"

    def __repr__(self) -> str:
        return f"RunDirectory({os.fspath(self.path)!r})"

    def create(self) -> None:
        """Makes the directories and proves that they can be read and written.

        Raises ConfigError when the path is or runs through a file or cannot be a path,
        ResourceError when it is not readable or writable or the disk has no room even for the small
        files of a run; room for checkpoints is `CheckpointStore.require_room`'s.
        """
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
        with self._explain():
            return claim(
                LockFile(Path(self.lock_file)),
                heartbeat_seconds=heartbeat_seconds,
                stale_seconds=stale_seconds,
            )

    def identify(self) -> identity.Identity:
        """Notes in `run.json` which run this is, and gives it: another than before in a copy of a
        directory that is still there."""
        directory = Path(self.path)
        before, found = identity.read(directory), identity.identify(directory)
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
