"""Objects in buckets (s3:// and gs://): the one place that talks to a store.

Every request is repeated with waits that double where the store is busy, refuses for the moment or
drops the connection. Credentials come from the environment or the machine, never from an address.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from arcticjax.errors import ConfigError, StoreError

SCHEMES = ("s3", "gs")
TRIES = 8
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 60.0
_REQUEST_SECONDS = 120  # for a part of a large object on a slow line, too
_ALL_TRIES_SECONDS = 300
_CHUNK = 8 << 20  # bytes; what a dropped connection costs
# What may follow the ? of an address.
_QUERY = {
    "s3": ("endpoint_override", "region", "scheme"),
    "gs": ("endpoint_override", "scheme"),
}
# Of a read that broke off after its answer had begun, which the client does not repeat.
_BROKEN_OFF = "response body"
_Found = TypeVar("_Found")


class Taken(OSError):
    """A conditional write found that another was first."""


@dataclass(frozen=True)
class Version:
    """Which content of an object a conditional write replaces."""

    e_tag: str | None
    version: str | None


@dataclass(frozen=True)
class Found:
    """An object: name below the bucket's place, size in bytes, time (seconds since 1970)."""

    name: str
    size: int
    modified: float
    version: Version


def is_address(text: str | os.PathLike[str]) -> bool:
    """Whether a path is that of an object store."""
    return urlsplit(os.fspath(text)).scheme in SCHEMES


def must_be_on_disk(option: str, place: str) -> None:
    """Raises ConfigError where a place, given as `option`, is in a bucket."""
    if is_address(place):
        raise ConfigError(f"{option}: {place} is in a bucket; name a folder on a disk")


def folder_here(address: str) -> Path:
    """Where this machine keeps what it has of a place in a bucket: in the user's cache folder
    ($XDG_CACHE_HOME, else ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    parts = urlsplit(address)
    key = f"{parts.scheme}://{parts.netloc}/{parts.path.strip('/')}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    return Path(base) / "arcticjax" / "runs" / digest[:16]


class Bucket:
    """A place in a bucket; the names of objects are relative to it. May be used by threads.

    All methods raise StoreError for what the store does not do; FileNotFoundError is said where
    a method may find nothing. Making one asks the store nothing.
    """

    def __init__(self, address: str, field: str) -> None:
        """address: `s3://BUCKET/PLACE` or `gs://BUCKET/PLACE`, with
        `?endpoint_override=HOST:PORT&scheme=http` for other stores with the same interface, and
        `&region=..` for s3://. field: what gave it, for messages. Raises ConfigError for one that
        is none."""
        parts = urlsplit(address)
        self.address = f"{parts.scheme}://{parts.netloc}/{parts.path.strip('/')}".rstrip("/")
        query = dict(parse_qsl(parts.query))
        known = _QUERY.get(parts.scheme, ())
        unknown = sorted(set(query) - set(known))
        if "@" in parts.netloc or any("key" in name or "secret" in name for name in unknown):
            raise ConfigError(
                f"{field}: the address holds credentials, which would be kept with the run; put "
                "them into the environment, as for the store's own tools"
            )
        if parts.scheme not in SCHEMES or not parts.netloc:
            raise ConfigError(f"{field}: {self.address} is no address of a bucket (s3://, gs://)")
        if unknown:
            raise ConfigError(
                f"{field}: {self.address}?{parts.query}: what follows the ? may be "
                f"{', '.join(known)} for {parts.scheme}://"
            )
        self._store = _open(parts.scheme, parts.netloc, query)
        self._place = parts.path.strip("/")

    def __repr__(self) -> str:
        return f"Bucket({self.address!r})"

    def below(self, name: str) -> Bucket:
        """A place within this one."""
        found = copy.copy(self)
        found.address, found._place = f"{self.address}/{name}", self._key(name)
        return found

    def read(self, name: str) -> bytes:
        """The content of an object; FileNotFoundError where there is none."""
        import obstore

        return self._ask(name, lambda: bytes(obstore.get(self._store, self._key(name)).bytes()))

    def chunks(self, name: str, size: int) -> Iterator[bytes]:
        """The content of an object of `size` bytes, piece by piece; raises as `read` does."""
        import obstore

        for start in range(0, size, _CHUNK):
            wanted = min(_CHUNK, size - start)

            def piece(start: int = start, wanted: int = wanted) -> bytes:
                key = self._key(name)
                return bytes(obstore.get_range(self._store, key, start=start, length=wanted))

            found = self._ask(name, piece)
            if len(found) != wanted:
                raise StoreError(f"{self.address}/{name}: {len(found)} of {wanted} bytes came")
            yield found

    def look(self, name: str) -> Found | None:
        """What there is of an object, or None."""
        import obstore

        try:
            return self._found(self._ask(name, lambda: obstore.head(self._store, self._key(name))))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes | Path) -> None:
        """Writes an object, or a file of any size, whole or not at all."""
        self._put(name, content, "overwrite")

    def create(self, name: str, content: bytes) -> Version:
        """Writes an object that is not there; raises Taken if it is."""
        return self._put(name, content, "create")

    def replace(self, name: str, content: bytes, version: Version) -> Version:
        """Writes an object in place of that version; raises Taken if it is another by now."""
        known = {key: value for key, value in vars(version).items() if value is not None}
        return self._put(name, content, known)

    def list(self, folder: str = "") -> list[Found]:
        """All objects below a folder by name; recent ones may be missing in some stores."""
        import obstore

        prefix = self._key(folder) or None
        with self._in_a_bucket():
            listed = self._ask(
                folder, lambda: [one for page in obstore.list(self._store, prefix) for one in page]
            )
        return sorted(map(self._found, listed), key=lambda one: one.name)

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder; recent ones may be missing in some stores."""
        import obstore

        with self._in_a_bucket():
            listed = self._ask(
                folder, lambda: obstore.list_with_delimiter(self._store, self._key(folder))
            )
        return sorted(path.rstrip("/").rpartition("/")[2] for path in listed["common_prefixes"])

    def delete(self, names: Iterable[str]) -> None:
        """Removes objects, those that are not there as well."""
        import obstore

        keys = [self._key(name) for name in names]
        try:
            self._ask("", lambda: obstore.delete(self._store, keys))
        except FileNotFoundError:  # not an error in S3
            for key in keys:
                with contextlib.suppress(FileNotFoundError):
                    self._ask("", lambda key=key: obstore.delete(self._store, key))

    def copy(self, name: str, target: str) -> None:
        """Copies an object within the store; FileNotFoundError where there is none."""
        import obstore

        source, copied = self._key(name), self._key(target)
        self._ask(name, lambda: obstore.copy(self._store, source, copied))

    def _put(self, name: str, content: bytes | Path, mode: Any) -> Version:
        import obstore
        from obstore import exceptions

        key = self._key(name)
        try:
            with self._in_a_bucket():
                done = self._ask(name, lambda: obstore.put(self._store, key, content, mode=mode))
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
            raise Taken(f"{self.address}/{name}: {_one_line(error)}") from None
        return Version(done["e_tag"], done["version"])

    @contextlib.contextmanager
    def _in_a_bucket(self) -> Iterator[None]:
        # Where nothing is named that might be missing, the bucket is.
        try:
            yield
        except FileNotFoundError:
            raise StoreError(f"{self.address}: there is no such bucket; make it") from None

    def _key(self, name: str) -> str:
        return "/".join(part for part in (self._place, name) if part)

    def _found(self, listed: Mapping[str, Any]) -> Found:
        name = listed["path"]
        if self._place:
            name = "" if name == self._place else name.removeprefix(f"{self._place}/")
        version = Version(listed["e_tag"], listed["version"])
        return Found(name, listed["size"], listed["last_modified"].timestamp(), version)

    def _ask(self, name: str, action: Callable[[], _Found]) -> _Found:
        from obstore import exceptions

        place = f"{self.address}/{name}".rstrip("/")
        for attempt in range(TRIES):
            try:
                return action()
            except FileNotFoundError:
                raise FileNotFoundError(f"{place}: there is no such object") from None
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                raise
            except exceptions.BaseError as error:
                said = _one_line(error)
                if attempt + 1 < TRIES and _BROKEN_OFF in said:
                    time.sleep(_wait(attempt))
                    continue
                raise StoreError(f"{place}: {said}{_advice(said)}") from None
        raise AssertionError("unreachable")


def _open(scheme: str, bucket: str, query: Mapping[str, str]) -> Any:
    from obstore import store

    common: dict[str, Any] = {
        "client_options": {"timeout": timedelta(seconds=_REQUEST_SECONDS)},
        "retry_config": {
            "max_retries": TRIES - 1,
            "retry_timeout": timedelta(seconds=_ALL_TRIES_SECONDS),
            "backoff": {
                "init_backoff": timedelta(seconds=_FIRST_WAIT_SECONDS),
                "max_backoff": timedelta(seconds=_LONGEST_WAIT_SECONDS),
                "base": 2,
            },
        },
    }
    config: Any = {}
    if "endpoint_override" in query:
        endpoint = f"{query.get('scheme', 'https')}://{query['endpoint_override']}"
        config["endpoint" if scheme == "s3" else "base_url"] = endpoint
        common["client_options"]["allow_http"] = query.get("scheme") == "http"
    if scheme == "gs":
        return store.GCSStore(bucket, config=config, **common)
    if "region" in query:
        config["region"] = query["region"]
    return store.S3Store(bucket, config=config, **common)


def _wait(attempt: int) -> float:
    # With chance in it, so that the processes of a run do not all come back at once.
    return _FIRST_WAIT_SECONDS * 2**attempt * random.uniform(0.5, 1.5)  # noqa: S311


def _one_line(error: BaseException) -> str:
    # Of obstore's text, what stands before its own account of the same.
    return " ".join(str(error).partition("Debug source")[0].split())[:400]


def _advice(said: str) -> str:
    if "169.254." in said or "metadata.google" in said:
        return (
            "; there are no credentials: put them into the environment (AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY; GOOGLE_APPLICATION_CREDENTIALS), or give the machine a role"
        )
    if "NoSuchBucket" in said:
        return "; there is no such bucket: make it"
    if "403" in said or "401" in said or "privileges" in said:
        return "; look at the credentials in the environment, and at what they may do there"
    if "301" in said or "Redirect" in said:
        return "; it is in another region: set AWS_REGION"
    return ""
