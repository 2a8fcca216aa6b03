"""Sources in buckets (s3://): copied to the cache once, then read like any other.

Reading goes through pyarrow's own client: it is in the core install, and takes credentials as the
store's own tools do, from the environment, endpoint and region from there or the address's query.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from arcticjax.config import SourceConfig
from arcticjax.data import record_files
from arcticjax.errors import ConfigError, DataError, ResourceError

SCHEME = "s3"
FOLDER = "buckets"
TRIES = 6
_FIRST_WAIT_SECONDS = 0.5
_CHUNK = 8 << 20  # bytes; what a dropped connection costs
# What comes back however often it is asked for.
_FINAL = ("ACCESS_DENIED", "Access Denied", "Forbidden", "403", "401")
_log = logging.getLogger(__name__)
_Found = TypeVar("_Found")


def holds(source: SourceConfig) -> bool:
    """Whether a source is in a bucket."""
    return urlsplit(source.path).scheme == SCHEME


def objects(source: SourceConfig) -> list[fs.FileInfo]:
    """What a source in a bucket consists of; raises as `local` does."""
    store, place = _open(source)
    return _list(store, place, _where(source))


def local(source: SourceConfig, cache: Path) -> SourceConfig:
    """The source, whose path, if in a bucket, is now that of its copy in the cache.

    The copy is keyed by address, names, sizes and times: what is there already is not read again.
    Several processes may call it at once. Raises DataError where there is nothing to read or
    the store does not answer after `TRIES`, ResourceError where the copy cannot be written.
    """
    if not holds(source):
        return source
    store, place = _open(source)
    where = _where(source)
    found = _list(store, place, where)
    facts = [source.path, [[one.path, one.size, one.mtime_ns] for one in found]]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    target = cache / FOLDER / f"{source.name}-{key[:16]}"
    if not target.exists():
        size = sum(one.size for one in found)
        _log.info("%s: copying %d objects, %.1f MB, into %s", where, len(found), size / 1e6, target)
        _copy(store, place, found, target, where)
        if [(one.path, one.size) for one in _list(store, place, where)] != [
            (one.path, one.size) for one in found
        ]:
            shutil.rmtree(target)
            raise DataError(f"{where}: changed while it was copied; run again when it is complete")
    single = len(found) == 1 and found[0].path == place
    path = target / _relative(found[0], place) if single else target
    return source.model_copy(update={"path": os.fspath(path)})


def _open(source: SourceConfig) -> tuple[fs.FileSystem, str]:
    """The store, and the place in it."""
    if "@" in urlsplit(source.path).netloc:
        raise ConfigError(
            f"data.sources: the address of source {source.name!r} holds credentials, which would "
            "be kept with the run; put them into the environment, as for the store's own tools"
        )
    try:
        return fs.FileSystem.from_uri(source.path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{_where(source)}: {_one_line(error)}") from None


def _where(source: SourceConfig) -> str:
    return f"source {source.name!r}, {source.path}"


def _list(store: fs.FileSystem, place: str, where: str) -> list[fs.FileInfo]:
    """The object at a place, or those below it, by name."""
    [found] = _retried(lambda: store.get_file_info([place]), where)
    if found.type == fs.FileType.File:
        return [found]
    everything = fs.FileSelector(place, allow_not_found=True, recursive=True)
    listed = _retried(lambda: store.get_file_info(everything), where)
    below = sorted(
        (one for one in listed if one.type == fs.FileType.File), key=lambda one: one.path
    )
    if not below:
        raise DataError(f"{where}: no such object, and none below it; look at the address")
    return below


def _copy(
    store: fs.FileSystem, place: str, found: list[fs.FileInfo], target: Path, where: str
) -> None:
    """Copies all objects below `target`, which is there whole or not at all."""
    with _explained(target):
        temporary = record_files.temporary_folder(target)
    try:
        for one in found:
            path = temporary / _relative(one, place)
            with _explained(path):
                if not path.resolve().is_relative_to(temporary.resolve()):
                    raise DataError(f"{where}: {one.path!r} is no name for a file; rename it")
                path.parent.mkdir(parents=True, exist_ok=True)
                file = path.open("wb")
            with file:
                for chunk in _chunks(store, one, where):
                    with _explained(path):
                        file.write(chunk)
            # The key of what is tokenised from it.
            os.utime(path, ns=(one.mtime_ns or 0, one.mtime_ns or 0))
        with _explained(target):
            temporary.chmod(0o755)
            try:
                temporary.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was first
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _chunks(store: fs.FileSystem, one: fs.FileInfo, where: str) -> Iterator[bytes]:
    where = f"{where}: {one.path}"
    for start in range(0, one.size, _CHUNK):
        wanted = min(_CHUNK, one.size - start)

        def read(start: int = start, wanted: int = wanted) -> bytes:
            with store.open_input_file(one.path) as file:
                found = file.read_at(wanted, start)
            if len(found) != wanted:
                raise OSError(f"{len(found)} of {wanted} bytes came at {start}")
            return found

        yield _retried(read, where)


def _retried(action: Callable[[], _Found], where: str) -> _Found:
    """What `action` gives, after waits that double, with chance in them so that the processes of a
    run do not all come back at once."""
    for attempt in range(TRIES):
        try:
            return action()
        except OSError as error:
            said = _one_line(error)
            if attempt + 1 == TRIES or any(word in said for word in _FINAL):
                raise DataError(
                    f"{where}: cannot be read ({said}), at try {attempt + 1} of {TRIES}; look at "
                    "the address, the credentials in the environment and the network, then run "
                    "the same command again"
                ) from None
            wait = _FIRST_WAIT_SECONDS * 2**attempt * random.uniform(0.5, 1.5)  # noqa: S311
            _log.warning("%s: %s; again in %.1f s", where, said, wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be written ({error.strerror or error}); free disk space or set "
            "another data.cache, then run the same command again"
        ) from None


def _relative(one: fs.FileInfo, place: str) -> str:
    return one.base_name if one.path == place else os.path.relpath(one.path, place)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
