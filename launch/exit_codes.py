"""What a launcher does when a process of a run ends (docs/exit_codes.md)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from arcticjax.errors import Hung, PeerLost, Preempted

# Ends of a run that the same command mends: preempted and saved; a peer lost; hung and stopped by
# the watchdog. Besides, 128 + a signal: SIGABRT (how jax itself ends when it loses a peer), SIGBUS,
# SIGKILL (the machine was taken or its memory was full), SIGSEGV, SIGTERM (before the run could
# handle it).
RESTART = frozenset(
    {Preempted.exit_code, PeerLost.exit_code, Hung.exit_code, 134, 135, 137, 139, 143}
)


def outcome(codes: Iterable[int]) -> Literal["done", "restart", "fail"]:
    """What to do when all processes of a run have ended with these codes.

    One that ended for a reason that stays drags the others down with restartable codes, so it
    decides.
    """
    bad = {code for code in codes if code}
    if not bad:
        return "done"
    return "restart" if bad <= RESTART else "fail"


def of_process(returncode: int) -> int:
    """An exit code as a shell gives it: 128 + the signal for a process that one ended."""
    return 128 - returncode if returncode < 0 else returncode
