"""Compiled programs kept on disk: the second run of a config compiles nothing.

What is found there is executed as it is, so the folder is private to its user. It has a part for
each kind of processor: home folders are shared between machines, and a program compiled for one
processor may use instructions that another has not.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import stat
from pathlib import Path
from typing import Any

import jax

from arcticjax.errors import ConfigError

# Programs that compile faster are not kept; jax's own limit of 1 s is above most of a small run's.
_LEAST_SECONDS = 0.3
_MOST_BYTES = 2 << 30  # beyond, what was not used for longest goes

_log = logging.getLogger(__name__)


def keep_compiled(folder: str) -> Path | None:
    """Lets jax keep what it compiles in `folder` and take it from there; must precede compiling.

    folder: a path; `auto` for arcticjax/compiled in the user's cache folder ($XDG_CACHE_HOME, else
    ~/.cache); `none` for nowhere. Where the environment names a folder or switches the cache off
    (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE), that stands. Returns the folder, or
    None where there is none or it is jax's own affair.

    Raises ConfigError for a given folder that cannot be made or that others can write to; `auto`
    does without it then, and says so.
    """
    if folder == "none" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return None
    settings: Any = jax.config  # its stubs know few of its names
    if not settings.jax_enable_compilation_cache:
        return None
    try:
        private = _private(_users() if folder == "auto" else Path(folder).expanduser())
    except (OSError, RuntimeError, ConfigError) as problem:  # RuntimeError: a user without a home
        if folder == "auto":
            _log.warning("compiled programs are not kept: %s", problem)
            return None
        if isinstance(problem, ConfigError):
            raise
        raise ConfigError(
            f"run.compilation_cache: {folder} cannot be used ({problem}); name another folder, or "
            "none"
        ) from problem
    chosen = private / _processor()
    chosen.mkdir(mode=0o700, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
    return chosen


def _users() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "arcticjax" / "compiled"


def _private(folder: Path) -> Path:
    """Makes a folder that only its user may use, or checks one that is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"run.compilation_cache: others can write to {folder}, and what is there would be "
            f"executed; chmod 700 {folder}, or name another folder (a shared one at your own risk "
            "with JAX_COMPILATION_CACHE_DIR in the environment)"
        )
    return folder


def _processor() -> str:
    """A name for this kind of processor: the same where the same instructions are there."""
    facts = [platform.system(), platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    facts.append(" ".join(sorted(flags.partition(":")[2].split())))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
