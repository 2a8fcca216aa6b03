"""What a lease is held in: something that one process at a time can change, on a disk or not."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from typing import Protocol


@dataclass(frozen=True)
class Owner:
    """Who holds a lease.

    `machine` tells apart hosts, boots and containers that see different process ids;
    `process_start` (clock ticks since boot, None off Linux) tells apart two processes that had the
    same id; `token` is unique to the claim.
    """

    host: str
    pid: int
    started: str
    machine: str
    process_start: int | None
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host} (running since {self.started})"


class Held(Protocol):
    """A lock as it is now: its owner if any, and its heartbeat, which differs after every beat."""

    @property
    def owner(self) -> Owner | None: ...

    @property
    def heartbeat(self) -> object: ...

    def age(self) -> float:
        """Seconds since the last heartbeat, by the clock of the storage."""
        ...

    def take(self, me: Owner) -> bool:
        """Makes `me` the owner; False where another was first."""
        ...

    def beat(self) -> bool:
        """Moves the heartbeat; False where another has taken the lock."""
        ...

    def free(self) -> None:
        """Leaves the lock without an owner."""
        ...


class Lock(Protocol):
    """Where a lock is. place: the directory that it guards; name: its own, in there."""

    @property
    def place(self) -> str: ...

    @property
    def name(self) -> str: ...

    def hold(self, *, create: bool) -> AbstractContextManager[Held]:
        """The lock, to look at and to change; FileNotFoundError if it is not there nor to be
        created, OSError if the storage fails."""
        ...


def encode(owner: Owner) -> bytes:
    """The text of a lock."""
    return (json.dumps(asdict(owner), indent=1) + "\n").encode()


def decode(content: bytes) -> Owner | None:
    """The owner, or None for an empty or damaged text: its writer died before it owned anything."""
    try:
        found = json.loads(content)
        return Owner(**{field.name: found[field.name] for field in fields(Owner)})
    except (ValueError, KeyError, TypeError):
        return None
