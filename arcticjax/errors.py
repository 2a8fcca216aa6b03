"""Errors a user can cause or meet, each with the exit code that scripts rely on.

A message says what is wrong, where, why it matters and what to do. `run_cli` prints it as the last
line of a failed command, without a traceback: tracebacks are for bugs.
"""

from __future__ import annotations

import argparse
import errno
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

# What the system answers where a user, and no code, can help: whatever the file is for.
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


class ArcticError(Exception):
    """A problem with a clear message. `exit_code` is the process's exit status (see
    docs/exit_codes.md)."""

    exit_code = 1


class ConfigError(ArcticError):
    """Usage or configuration is wrong, changed under a run that resumes, or differs between its
    processes."""

    exit_code = 2


class DataError(ArcticError):
    """A source, record or retrieval task is missing, empty or malformed."""

    exit_code = 3


class CheckpointError(ArcticError):
    """Weights or a checkpoint are torn, foreign, of another shape or in an unsafe format."""

    exit_code = 4


class NumericsError(ArcticError):
    """The loss or a gradient is not finite."""

    exit_code = 5


class ResourceError(ArcticError):
    """The disk or memory is full, or a path cannot be read or written."""

    exit_code = 8


class StoreError(ResourceError, OSError):
    """An object store refuses a request, or stays away."""


class Preempted(ArcticError):
    """The run was asked to stop; the same command goes on from what is saved."""

    exit_code = 42


class PeerLost(ArcticError):
    """Another process of the run is gone, or did not come in time."""

    exit_code = 141


class Hung(ArcticError):
    """The run makes no progress."""

    exit_code = 142


class ArgumentParser(argparse.ArgumentParser):
    """Reads a command line; a wrong one is a ConfigError like any other."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def run_cli(
    main: Callable[[], int | None], leave: Callable[[int], NoReturn] = sys.exit
) -> NoReturn:
    """Runs `main` and exits: 0 or its return value, or an error's exit code with its message last
    on stderr. Errors are `ArcticError`, Ctrl-C, memory that is used up, and a file that the system
    does not let be read or written."""
    try:
        code = main() or 0
    except ArcticError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt as error:
        # A run says in it what is saved.
        said = f": {error}" if str(error) else ""
        print(f"error: interrupted{said}", file=sys.stderr, flush=True)
        code = 130
    except OSError as error:
        # Writing to an open file says no name: the traceback tells where it was.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.errno not in _FORBIDDEN or not (error.filename or full):
            raise
        sys.stdout.flush()
        if not error.filename:
            traceback.print_exc()
        print(
            f"error: {error.filename or 'an open file'}: {error.strerror}. Check its "
            "permissions and the room on its disk, then run the same command again",
            file=sys.stderr,
            flush=True,
        )
        code = ResourceError.exit_code
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        sys.stdout.flush()
        lines = str(error).splitlines() or ["the machine's"]
        print(
            f"error: memory is full ({lines[0][:300]}). A training run needs less with a lower "
            "train.microbatch, with train.passes: two, and with a lower train.global_batch; the "
            "first two may change when a run resumes, the third needs another run.directory",
            file=sys.stderr,
            flush=True,
        )
        code = ResourceError.exit_code
    leave(code)


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether the machine's memory or, as jax's RuntimeError says it, a device's is used up."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
