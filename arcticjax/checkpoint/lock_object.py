"""A lock in an object of a bucket, changed only by conditional writes, of which one wins.

The heartbeat is the time of the object: each beat writes it anew. A lock that was given up is an
empty object, as no store removes one on condition.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

from arcticjax.buckets import Bucket, Found, Taken
from arcticjax.checkpoint.lock import Held, Owner, decode, encode


class LockObject:
    """The lock in an object, which need not exist; see `Lock`."""

    def __init__(self, bucket: Bucket, name: str) -> None:
        self.bucket, self._name = bucket, name

    @property
    def place(self) -> str:
        return self.bucket.address

    @property
    def name(self) -> str:
        return self._name

    @contextlib.contextmanager
    def hold(self, *, create: bool) -> Iterator[Held]:
        """The object as it is now; nothing keeps others from changing it, but then `take`, `beat`
        and `free` change nothing."""
        found = self.bucket.look(self._name)
        if found is None and not create:
            raise FileNotFoundError(f"{self.place}/{self._name} is gone")
        yield _HeldObject(self.bucket, self._name, found)


class _HeldObject:
    def __init__(self, bucket: Bucket, name: str, found: Found | None) -> None:
        self._bucket, self._name, self._found = bucket, name, found
        self.owner = None if found is None else decode(bucket.read(name))
        self.heartbeat = found

    def age(self) -> float:
        if self._found is None:
            return 0.0
        # The store's own clock, by the time of an object written just now.
        probe = f".{self._name}-{uuid.uuid4().hex}"
        self._bucket.write(probe, b"")
        now = self._bucket.look(probe)
        self._bucket.delete([probe])
        return 0.0 if now is None else now.modified - self._found.modified

    def take(self, me: Owner) -> bool:
        return self._change(encode(me))

    def beat(self) -> bool:
        return self.owner is not None and self._change(encode(self.owner))

    def free(self) -> None:
        self._change(b"")

    def _change(self, content: bytes) -> bool:
        try:
            if self._found is None:
                self._bucket.create(self._name, content)
            else:
                self._bucket.replace(self._name, content, self._found.version)
        except Taken:
            # A write whose answer was lost is repeated, and finds itself.
            return self._bucket.read(self._name) == content
        return True
