"""One writer per run directory: a lock with its owner's name and a heartbeat."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from arcticjax.checkpoint.lock import Lock, Owner
from arcticjax.errors import ConfigError

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
_POLL_SECONDS = 0.5
_log = logging.getLogger(__name__)


class Lease:
    """A held lease: beats until released, at the latest when the interpreter exits."""

    def __init__(
        self, lock: Lock, owner: Owner, heartbeat_seconds: float, field: str = "run.directory"
    ) -> None:
        self.lock = lock
        self.owner = owner
        self._field = field
        self._lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._beat, args=(heartbeat_seconds,), name="run-lease", daemon=True
        )
        self._thread.start()
        atexit.register(self.release)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    @property
    def lost(self) -> bool:
        """True once another process owns the directory, or the lock was removed."""
        return self._lost

    def check(self) -> None:
        """Raises ConfigError when the lease was lost, so that the run stops before it writes."""
        if self._lost:
            raise ConfigError(
                f"{self._field} {self.lock.place} was taken over by another run (this process was "
                f"suspended for long, or {self.lock.name} was removed): nothing more is written; "
                "use a directory per run"
            )

    def release(self) -> None:
        """Stops the heartbeat and frees the lock if it is still ours; may be repeated."""
        # A forked child inherits the object, not the lease.
        if self._stop.is_set() or os.getpid() != self.owner.pid:
            return
        self._stop.set()
        self._thread.join()
        atexit.unregister(self.release)
        with contextlib.suppress(OSError), self.lock.hold(create=False) as held:
            if held.owner is not None and held.owner.token == self.owner.token:
                held.free()

    def _beat(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            try:
                with self.lock.hold(create=False) as held:
                    mine = held.owner is not None and held.owner.token == self.owner.token
                    self._lost = not (mine and held.beat())
            except FileNotFoundError:
                self._lost = True
            except OSError as error:
                # Storage in the network that is away for a moment: the next beat may succeed.
                _log.debug("heartbeat of %s failed: %s", self.lock.place, error)
            if self._lost:
                _log.warning("the lock of %s belongs to another run now", self.lock.place)
                return


def claim(
    lock: Lock,
    *,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
    stale_seconds: float = STALE_SECONDS,
    field: str = "run.directory",
) -> Lease:
    """Takes the lease in a lock; raises ConfigError naming the owner if it is held.

    field: what the place of the lock is called in the config, for messages.

    An owner on this machine is held to be alive as long as its process is. Any other is believed as
    long as its heartbeat moves: a heartbeat older than `stale_seconds` is taken over with a
    warning, and for a younger one this waits until it moves (the owner lives) or gets that old.
    OSError from the storage is the caller's to explain.
    """
    me, place = _myself(), lock.place
    deadline = time.monotonic() + 2 * stale_seconds
    waiting: tuple[str, object] | None = None  # whose sign of life, and the last one seen
    while True:
        with lock.hold(create=True) as held:
            owner = held.owner
            age = held.age() if owner else 0.0
            alive = _is_running(owner, me) if owner else False
            if owner and waiting is not None and waiting[0] != owner.token:
                alive = True  # somebody else took it over while this process waited
            if alive is None and age > stale_seconds:
                alive = False
            if alive is None and waiting is not None and held.heartbeat != waiting[1]:
                alive = True
            if alive or (owner and time.monotonic() > deadline):
                raise ConfigError(
                    f"{field} {place} is in use by {owner}: two runs must not share "
                    f"a directory; wait for it, stop it, or set another {field}"
                )
            if alive is False and held.take(me):
                if owner:
                    _log.warning(
                        "taking over %s %s from %s, which ended without releasing it "
                        "(last heartbeat %d s ago)", field, place, owner, age,
                    )  # fmt: skip
                return Lease(lock, me, heartbeat_seconds, field)
            if alive is None and owner and waiting is None:
                _log.warning(
                    "%s %s was claimed by %s, which cannot be seen from here: waiting up to "
                    "%d s for a sign of life", field, place, owner, stale_seconds - age,
                )  # fmt: skip
                waiting = (owner.token, held.heartbeat)
        time.sleep(min(_POLL_SECONDS, stale_seconds / 4))


def _myself() -> Owner:
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=_machine(),
        process_start=_process_start(os.getpid()),
        token=uuid.uuid4().hex,
    )


def _machine() -> str:
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _is_running(owner: Owner, me: Owner) -> bool | None:
    """Whether the owner's process runs; None when that cannot be seen from this machine."""
    if owner.machine != me.machine:
        return None
    if me.process_start is not None:
        start = _process_start(owner.pid)
        return start is not None and owner.process_start in (None, start)
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _process_start(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot, from /proc (Linux)."""
    try:
        # The command name, in parentheses, may itself hold spaces and parentheses.
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(rest[18])
