"""Sources in buckets (s3://, gs://): copied to the cache once, then read like any other."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arcticjax.buckets import Bucket, Found, is_address
from arcticjax.config import SourceConfig
from arcticjax.data import record_files
from arcticjax.errors import DataError, ResourceError, StoreError

FOLDER = "buckets"
_log = logging.getLogger(__name__)


def holds(source: SourceConfig) -> bool:
    """Whether a source is in a bucket."""
    return is_address(source.path)


def objects(source: SourceConfig) -> list[Found]:
    """What a source in a bucket consists of; raises as `local` does."""
    return _list(_open(source), _where(source))


def local(source: SourceConfig, cache: Path) -> SourceConfig:
    """The source, whose path, if in a bucket, is now that of its copy in the cache.

    The copy is keyed by address, names, sizes and times: what is there already is not read again.
    Several processes may call it at once. Raises DataError where there is nothing to read or
    the store does not answer, ResourceError where the copy cannot be written.
    """
    if not holds(source):
        return source
    bucket, where = _open(source), _where(source)
    found = _list(bucket, where)
    facts = [source.path, [[one.name, one.size, one.modified] for one in found]]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    target = cache / FOLDER / f"{source.name}-{key[:16]}"
    if not target.exists():
        size = sum(one.size for one in found)
        _log.info("%s: copying %d objects, %.1f MB, into %s", where, len(found), size / 1e6, target)
        _copy(bucket, found, target, where)
        if [(one.name, one.size) for one in _list(bucket, where)] != [
            (one.name, one.size) for one in found
        ]:
            shutil.rmtree(target)
            raise DataError(f"{where}: changed while it was copied; run again when it is complete")
    single = len(found) == 1 and not found[0].name
    path = target / _file_name(found[0], bucket) if single else target
    return source.model_copy(update={"path": os.fspath(path)})


def _open(source: SourceConfig) -> Bucket:
    return Bucket(source.path, f"data.sources, source {source.name!r}")


def _where(source: SourceConfig) -> str:
    return f"source {source.name!r}, {source.path}"


def _list(bucket: Bucket, where: str) -> list[Found]:
    """The object at a place, whose name is then empty, or those below it, by name."""
    with _asking(where):
        itself = bucket.look("")
        below = [itself] if itself is not None else bucket.list()
    if not below:
        raise DataError(f"{where}: no such object, and none below it; look at the address")
    return below


def _copy(bucket: Bucket, found: list[Found], target: Path, where: str) -> None:
    """Copies all objects below `target`, which is there whole or not at all."""
    with _explained(target):
        temporary = record_files.temporary_folder(target)
    try:
        for one in found:
            path = temporary / _file_name(one, bucket)
            with _explained(path):
                if not path.resolve().is_relative_to(temporary.resolve()):
                    raise DataError(f"{where}: {one.name!r} is no name for a file; rename it")
                path.parent.mkdir(parents=True, exist_ok=True)
                file = path.open("wb")
            with file:
                for chunk in _chunks(bucket, one, where):
                    with _explained(path):
                        file.write(chunk)
            # The key of what is tokenised from it.
            os.utime(path, (one.modified, one.modified))
        with _explained(target):
            temporary.chmod(0o755)
            try:
                temporary.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was first
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _chunks(bucket: Bucket, one: Found, where: str) -> Iterator[bytes]:
    chunks = bucket.chunks(one.name, one.size)
    while True:
        with _asking(where):
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


def _file_name(one: Found, bucket: Bucket) -> str:
    return one.name or bucket.address.rpartition("/")[2]


@contextmanager
def _asking(where: str) -> Iterator[None]:
    try:
        yield
    except (StoreError, FileNotFoundError) as error:
        raise DataError(
            f"{where}: cannot be read ({error}); look at the address, the credentials in the "
            "environment and the network, then run the same command again"
        ) from None


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be written ({error.strerror or error}); free disk space or set "
            "another data.cache, then run the same command again"
        ) from None
