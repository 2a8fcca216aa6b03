"""What a mining run says of itself, and where it stops when it is asked to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import jax
from jax.experimental import multihost_utils

from arcticjax.errors import Preempted
from arcticjax.parallel import distributed

_SPEAK_SECONDS = 10.0


class Progress:
    """Says how far a phase is, and stops between shards when all processes are asked to."""

    def __init__(self, check_lease: Callable[[], None]) -> None:
        self._check_lease = check_lease
        self._step = 0

    def follow(self, what: str, counts: Iterable[int], total: int) -> None:
        """Runs through `counts`, texts done at a time, of `total` at most."""
        began = spoke = time.monotonic()
        done = 0
        for count in counts:
            self._check_lease()
            done += count
            now = time.monotonic()
            if now - spoke > _SPEAK_SECONDS:
                spoke = now
                rate = done / (now - began)
                say(f"{what}: {done:,} of at most {total:,}, {rate:,.0f}/s")
            # One process is stopped by its signal at once; several agree on a shard.
            self._step += 1
            if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(
                self._step
            ):
                raise Preempted(
                    f"asked to stop: {what}: {done:,} more were written; the same command goes on "
                    "from there"
                )
        seconds = time.monotonic() - began
        if done:
            say(f"{what}: {done:,} in {seconds:.1f} s, {done / max(seconds, 1e-9):,.0f}/s")


def say(line: str) -> None:
    """Prints a line, on process 0."""
    if distributed.talks():
        print(line, flush=True)
