"""Several processes of one run on this machine.

    python -m launch.local --processes 2 -- python -m arcticjax.train --config FILE

Each finds the others by ARCTICJAX_COORDINATOR, ARCTICJAX_PROCESSES and ARCTICJAX_PROCESS; its
output comes with its number in front. The first that fails ends the rest and gives the exit code.
SIGTERM and Ctrl-C are passed on.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, TextIO

from arcticjax.errors import ArgumentParser, ConfigError, run_cli
from launch.commands import check_no_secret
from launch.exit_codes import of_process

# What a process has to end by itself once another has failed: it may be writing why, too.
GRACE_SECONDS = 15.0
_POLL_SECONDS = 0.05


def environments(processes: int, gpus_each: int = 0) -> list[dict[str, str]]:
    """The variables by which each of several processes on this machine finds the others, and, with
    `gpus_each`, its own GPUs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = []
    for rank in range(processes):
        one = {
            "ARCTICJAX_COORDINATOR": f"localhost:{port}",
            "ARCTICJAX_PROCESSES": str(processes),
            "ARCTICJAX_PROCESS": str(rank),
        }
        if gpus_each:
            gpus = range(rank * gpus_each, (rank + 1) * gpus_each)
            one["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        found.append(one)
    return found


def launch(
    command: Sequence[str],
    processes: int,
    *,
    gpus_each: int = 0,
    environment: Mapping[str, str] | None = None,
    grace_seconds: float = GRACE_SECONDS,
    out: TextIO | None = None,
) -> int:
    """Runs `command` so many times at once; 0 when all succeed, else the code of the first that
    failed, after the others have ended or, `grace_seconds` later, were ended.

    environment: what all see (this process's own, if left out). Each process leads a process group,
    so that what it started ends with it. Raises ConfigError where the command cannot be started.
    """
    out = out or sys.stdout
    base = os.environ if environment is None else environment
    started: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    lock = threading.Lock()
    try:
        with _passing_on_signals(started):
            for rank, own in enumerate(environments(processes, gpus_each)):
                process = _start(command, {**base, **own})
                started.append(process)
                assert process.stdout is not None
                reader = threading.Thread(
                    target=_copy, args=(process.stdout, f"[{rank}] ", out, lock), daemon=True
                )
                reader.start()
                readers.append(reader)
            code = _wait(started, grace_seconds)
        # A process that outlives its leader may keep the pipe open.
        _signal_all(started, signal.SIGKILL)
        for reader in readers:
            reader.join(grace_seconds)
        return code
    finally:
        _signal_all(started, signal.SIGKILL)


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(  # noqa: S603
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise ConfigError(
            f"{shlex.join(command)}: cannot be started: {error.strerror or error}"
        ) from None


def _wait(started: Sequence[subprocess.Popen[str]], grace_seconds: float) -> int:
    """The code of the first that failed, or 0; none runs afterwards."""
    first, deadline = 0, float("inf")
    harder = iter((signal.SIGTERM,))
    while True:
        running = [process for process in started if process.poll() is None]
        failed = [process.returncode for process in started if process.returncode]
        if failed and not first:
            first, deadline = of_process(failed[0]), time.monotonic() + grace_seconds
        if not running:
            return first
        if time.monotonic() > deadline:
            _signal_all(running, next(harder, signal.SIGKILL))
            deadline = time.monotonic() + grace_seconds
        time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _passing_on_signals(started: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
    """While entered, what this process is asked to do its children are asked to do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, lambda number, _: _signal_all(started, number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal_all(started: Sequence[subprocess.Popen[str]], number: int) -> None:
    for process in started:
        # SIGKILL also reaches what an ended leader has left behind in its group.
        if process.poll() is None or number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def _copy(source: IO[str], prefix: str, out: TextIO, lock: threading.Lock) -> None:
    with source:
        for line in source:
            with lock:
                try:
                    out.write(prefix + line.rstrip("\n") + "\n")
                    out.flush()
                except OSError:
                    # Who read it has gone, or its disk is full. The run goes on, so its pipe must
                    # still be emptied.
                    with open(os.devnull, "w") as nowhere:
                        os.dup2(nowhere.fileno(), out.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; raises ArcticError for what the user can mend."""
    parser = ArgumentParser(
        prog="python -m launch.local",
        description="Run one command as several processes of one run on this machine. The first "
        "that fails ends the rest and gives the exit code.",
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N")
    parser.add_argument(
        "--gpus-each",
        type=int,
        default=0,
        metavar="N",
        help="GPUs of each process (CUDA_VISIBLE_DEVICES); left out: each sees what this one sees",
    )
    parser.add_argument(
        "--grace-seconds",
        type=float,
        default=GRACE_SECONDS,
        metavar="S",
        help="how long the others may take to end once one has failed (%(default)g)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands that would run, and stop"
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --")
    options = parser.parse_args(arguments)
    if options.processes < 1:
        raise ConfigError(f"--processes: {options.processes} is not 1 or more")
    if options.gpus_each < 0 or not 0 <= options.grace_seconds <= threading.TIMEOUT_MAX:
        raise ConfigError(
            "--gpus-each and --grace-seconds are 0 or more, the seconds at most "
            f"{threading.TIMEOUT_MAX:g}"
        )
    check_no_secret(options.command)
    if options.dry_run:
        for own in environments(options.processes, options.gpus_each):
            values = [f"{name}={value}" for name, value in own.items()]
            print(shlex.join(["env", *values, *options.command]))
        return 0
    return launch(
        options.command,
        options.processes,
        gpus_each=options.gpus_each,
        grace_seconds=options.grace_seconds,
    )


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
