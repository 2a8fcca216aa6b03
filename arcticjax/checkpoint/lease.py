"""One writer per run directory: a lock file with its owner's name and a heartbeat.

The file is read and changed only under `flock`, so two claims cannot both win; the heartbeat is
its modification time, compared with the time of a file written beside it, so that clocks of
different hosts do not matter and a full disk does not stop it.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from arcticjax.errors import ConfigError

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
_POLL_SECONDS = 0.5
_log = logging.getLogger(__name__)


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


class Lease:
    """A held lease: beats until released, at the latest when the interpreter exits."""

    def __init__(
        self, path: Path, owner: Owner, heartbeat_seconds: float, field: str = "run.directory"
    ) -> None:
        self.path = path
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
        """True once another process owns the directory, or the lock file was removed."""
        return self._lost

    def check(self) -> None:
        """Raises ConfigError when the lease was lost, so that the run stops before it writes."""
        if self._lost:
            raise ConfigError(
                f"{self._field} {self.path.parent} was taken over by another run (this process was "
                f"suspended for long, or {self.path.name} was removed): nothing more is written; "
                "use a directory per run"
            )

    def release(self) -> None:
        """Stops the heartbeat and removes the lock file if it is still ours; may be repeated."""
        # A forked child inherits the object, not the lease.
        if self._stop.is_set() or os.getpid() != self.owner.pid:
            return
        self._stop.set()
        self._thread.join()
        atexit.unregister(self.release)
        with contextlib.suppress(OSError), _locked(self.path, create=False) as descriptor:
            if _is_owner(descriptor, self.owner):
                self.path.unlink()

    def _beat(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            try:
                with _locked(self.path, create=False) as descriptor:
                    self._lost = not _is_owner(descriptor, self.owner)
                    if not self._lost:
                        os.utime(descriptor)
            except FileNotFoundError:
                self._lost = True
            except OSError as error:
                # A network disk that is away for a moment: the next beat may succeed.
                _log.debug("heartbeat of %s failed: %s", self.path, error)
            if self._lost:
                _log.warning("the lock of %s belongs to another run now", self.path.parent)
                return


def claim(
    path: Path,
    *,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
    stale_seconds: float = STALE_SECONDS,
    field: str = "run.directory",
) -> Lease:
    """Takes the lease in the lock file `path`; raises ConfigError naming the owner if it is held.

    field: what the folder of `path` is called in the config, for messages.

    An owner on this machine is held to be alive as long as its process is. Any other is believed as
    long as its heartbeat moves: a heartbeat older than `stale_seconds` is taken over with a
    warning, and for a younger one this waits until it moves (the owner lives) or gets that old.
    OSError from the file system is the caller's to explain.
    """
    me = _myself()
    deadline = time.monotonic() + 2 * stale_seconds
    first_beat: float | None = None
    waiting_for: str | None = None
    while True:
        with _locked(path, create=True) as descriptor:
            owner, beat = _read(descriptor), os.fstat(descriptor).st_mtime
            age = _now(path) - beat
            alive = _is_running(owner, me) if owner else False
            if owner and waiting_for not in (None, owner.token):
                alive = True  # somebody else took it over while this process waited
            if alive is None and age > stale_seconds:
                alive = False
            if alive is None and first_beat is not None and beat != first_beat:
                alive = True
            if alive or (owner and time.monotonic() > deadline):
                raise ConfigError(
                    f"{field} {path.parent} is in use by {owner}: two runs must not share "
                    f"a directory; wait for it, stop it, or set another {field}"
                )
            if alive is False:
                if owner:
                    _log.warning(
                        "taking over %s %s from %s, which ended without releasing it "
                        "(last heartbeat %d s ago)", field, path.parent, owner, age,
                    )  # fmt: skip
                _write(descriptor, me)
                break
            if first_beat is None and owner:
                _log.warning(
                    "%s %s was claimed by %s, which cannot be seen from here: waiting up to "
                    "%d s for a sign of life", field, path.parent, owner, stale_seconds - age,
                )  # fmt: skip
                first_beat, waiting_for = beat, owner.token
        time.sleep(min(_POLL_SECONDS, stale_seconds / 4))
    return Lease(path, me, heartbeat_seconds, field)


@contextlib.contextmanager
def _locked(path: Path, *, create: bool) -> Iterator[int]:
    """Opens the lock file, holds its `flock` and yields the descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
        try:
            # Where flock is not supported (some network disks) the heartbeat alone decides.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The file may have been released (unlinked) while this process waited.
            if _is_same_file(descriptor, path):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> Owner | None:
    """The owner, or None for an empty or damaged file: its writer died before it owned anything."""
    try:
        content = json.loads(os.pread(descriptor, 1 << 16, 0))
        return Owner(**{field.name: content[field.name] for field in fields(Owner)})
    except (ValueError, KeyError, TypeError):
        return None


def _write(descriptor: int, owner: Owner) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(asdict(owner), indent=1) + "\n").encode(), 0)
    os.fsync(descriptor)


def _is_owner(descriptor: int, owner: Owner) -> bool:
    found = _read(descriptor)
    return found is not None and found.token == owner.token


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
