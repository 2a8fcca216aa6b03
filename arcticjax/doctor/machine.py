"""What one process can say of its machine and of the packages it runs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import signal
import time
import uuid
from pathlib import Path

from packaging.requirements import Requirement

from arcticjax.checkpoint import disk
from arcticjax.doctor.findings import Finding
from arcticjax.errors import ConfigError, ResourceError

# Whose versions decide what is computed, and what talks to an accelerator.
_SHOWN = ("arcticjax", "jax", "jaxlib", "flax", "orbax-checkpoint", "grain")
_DRIVERS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
_PROBE_BYTES = 1 << 20
_FEWEST_FILES = 1024
# A clock that is wrong by more makes heartbeats on a shared disk look dead or eternal
# (checkpoint/lease.py believes them for minutes).
_MOST_SKEW_SECONDS = 10.0


def versions() -> Finding | str:
    """Python and the packages; a failure where one is outside what this package asks for."""
    shown = [f"python {platform.python_version()}"]
    shown += [f"{name} {found}" for name in (*_SHOWN, *_DRIVERS) if (found := _version(name))]
    wrong = [
        f"{one.name} {found or 'is missing'} (needs {one.specifier})"
        for one in map(Requirement, importlib.metadata.requires("arcticjax") or ())
        if one.marker is None or one.marker.evaluate({"extra": ""})
        if not (found := _version(one.name)) or not one.specifier.contains(found, prereleases=True)
    ]
    if wrong:
        return Finding(
            "versions", "fail", "; ".join(wrong), "uv sync, or pip install --upgrade arcticjax"
        )
    return ", ".join(shown)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def stopping() -> Finding | str:
    """Whether SIGTERM, by which machines are taken away, would reach a run."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler == signal.SIG_IGN:
        return Finding(
            "SIGTERM",
            "fail",
            "ignored, as whatever started this process set it: a run on a machine that is taken "
            "away would not save",
            "start it without the wrapper that ignores SIGTERM (trap '' TERM in a shell does)",
        )
    if handler != signal.SIG_DFL:
        return Finding(
            "SIGTERM",
            "warn",
            f"handled by {getattr(handler, '__qualname__', handler)} before the run begins",
            "the run puts its own handler there",
        )
    return "reaches the run, which saves and exits 42"


def open_files() -> Finding | str:
    """Whether enough files may be open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FEWEST_FILES:
        return Finding(
            "open files",
            "warn",
            f"{soft} at once, and a run may open more",
            f"ulimit -n {min(65536, hard) if hard > 0 else 65536}",
        )
    return f"{soft} at once"


def memory(needed: int) -> Finding | str:
    """Whether `needed` bytes are free in this machine's memory; 0 asks for nothing."""
    available = _available_memory()
    if available is None:
        return "cannot be told on this system"
    if available < needed:
        return Finding(
            "memory",
            "fail",
            f"{_size(available)} free, loading the model takes {_size(needed)}",
            "end other programs, or take a machine with more",
            resource=True,
        )
    return f"{_size(available)} free" + (f", {_size(needed)} to load the model" if needed else "")


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024


def storage(directory: Path) -> Finding:
    """Writes, reads and deletes a probe where a run's directory is or would be made."""
    place = nearest(directory)
    if not place.is_dir():
        raise ConfigError(
            f"run.directory {directory}: {place} is not a directory; move it away or set another "
            "run.directory"
        )
    probe = place / f".doctor-{uuid.uuid4().hex}"
    content = os.urandom(_PROBE_BYTES)
    began = time.perf_counter()
    try:
        try:
            with open(probe, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            read = probe.read_bytes()
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(
            f"run.directory {directory}: a file in {place} cannot be written, read and deleted "
            f"({error.strerror or error}); change its permissions, make room, or set another "
            "run.directory"
        ) from None
    if read != content:
        raise ResourceError(
            f"run.directory {directory}: {place} gives back other bytes than were written; do not "
            "use this disk"
        )
    took = time.perf_counter() - began
    where = f"{directory}" + ("" if place == directory else f" (to be made in {place})")
    found = f"{where}: 1 MiB written, read and deleted in {took:.2f} s"
    return Finding("storage", "ok", found, seconds=took)


def bucket(address: str) -> Finding:
    """Writes, reads and deletes a probe in a run's directory in a bucket."""
    from arcticjax.checkpoint import run_directory

    directory = run_directory.RunDirectory(address)
    began = time.perf_counter()
    if directory.bucket is not None:
        run_directory.probe(directory.bucket)
    took = time.perf_counter() - began
    found = f"{directory.place}: an object written, read and deleted in {took:.2f} s"
    return Finding("storage", "ok", found, seconds=took)


def room(directory: Path, needed: int) -> str:
    """Whether the disk has `needed` bytes free; 0 asks for nothing."""
    free = disk.free_bytes(directory)
    if free is None:
        return "cannot be told for this place"
    disk.require_free(directory, needed, "the run's checkpoints")
    return f"{_size(free)} free" + (f", the checkpoints take {_size(needed)}" if needed else "")


def clock(directory: Path) -> Finding | str:
    """How far this machine's clock is from that of the disk which holds the run."""
    probe = nearest(directory) / f".doctor-{uuid.uuid4().hex}"
    try:
        probe.touch()
        skew = probe.stat().st_mtime - time.time()
    finally:
        probe.unlink(missing_ok=True)
    return judge_skew("disk's clock", skew, "the disk's")


def judge_skew(check: str, skew_seconds: float, other: str) -> Finding | str:
    """A clock that is off by this much from another one."""
    if abs(skew_seconds) > _MOST_SKEW_SECONDS:
        return Finding(
            check,
            "fail",
            f"{abs(skew_seconds):.0f} s {'behind' if skew_seconds > 0 else 'ahead of'} {other}",
            "synchronise it (chronyc makestep, timedatectl set-ntp true)",
        )
    return f"within {_MOST_SKEW_SECONDS:.0f} s of {other}"


def nearest(directory: Path) -> Path:
    """The directory, or the nearest thing above it that exists."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return directory


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
