"""A job on TPU VMs, kept going: what to do next, as a function of what is seen.

`decide` is pure: a test replays any history. `__main__` looks, acts and waits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from arcticjax.errors import ConfigError, ResourceError
from launch.exit_codes import outcome

Action = Literal["create", "delete", "setup", "start", "stop", "wait", "end"]

# States of a queued resource: cloud.google.com/tpu/docs/queued-resources and the enum State of
# google.cloud.tpu.v2. SUSPENDED is what preemption ends in.
_COMING = ("CREATING", "ACCEPTED", "PROVISIONING", "WAITING_FOR_RESOURCES", "STATE_UNSPECIFIED")
_GOING = ("DELETING", "SUSPENDING")
_GONE = ("SUSPENDED", "FAILED")

POLL_SECONDS = 30.0
_LONGEST_PAUSE_SECONDS = 600.0
_STATUS = re.compile(
    r"^arcticjax-status (\S+) (\S+) (idle|running|ended)(?: (\d+))?$", re.MULTILINE
)


@dataclass(frozen=True)
class Worker:
    """One worker's own word. revision: of the code that is set up there, or none; state: idle,
    running, or ended with `code`."""

    host: str
    revision: str
    state: str
    code: int = 0


@dataclass(frozen=True)
class Seen:
    """One look. resource: the queued resource's state, None where there is none; answered: whether
    every worker could be reached; now: seconds, of a clock that only moves on."""

    now: float
    resource: str | None
    workers: tuple[Worker, ...] = ()
    answered: bool = True


@dataclass(frozen=True)
class Limits:
    """When to stop trying. A run that lasted `healthy_seconds` clears the count of restarts."""

    restarts: int = 20
    failed_requests: int = 5
    setups: int = 3
    unanswered: int = 10
    stragglers: int = 10
    healthy_seconds: float = 1800.0


@dataclass(frozen=True)
class Memory:
    """What must be remembered between looks. started: when this babysitter last started the
    command on the present slices."""

    restarts: int = 0
    failed_requests: int = 0
    setups: int = 0
    unanswered: int = 0
    stragglers: int = 0
    started: float | None = None


@dataclass(frozen=True)
class Step:
    """What to do, and how long to wait: before a start, after all else. code: of the babysitter
    itself, where it ends."""

    action: Action
    say: str
    wait_seconds: float = 0.0
    code: int = 0


def decide(seen: Seen, memory: Memory, revision: str, limits: Limits) -> tuple[Step, Memory]:
    """The next step, and what to remember. revision: of the code that should run."""
    state = seen.resource
    if state is None:
        return Step("create", "asking for the slices"), replace(memory, unanswered=0, stragglers=0)
    if state in _COMING:
        return Step("wait", f"the request is {state}", 2 * POLL_SECONDS), memory
    if state in _GOING:
        return Step("wait", f"the slices are {state}", POLL_SECONDS), memory
    if state in _GONE:
        return _gone(state, memory, limits)
    if state != "ACTIVE":
        return Step("wait", f"unknown state {state}", POLL_SECONDS), memory
    memory = replace(memory, failed_requests=0)
    if not seen.answered or not seen.workers:
        return _unanswered(memory, limits)
    return _active(seen, replace(memory, unanswered=0), revision, limits)


def _gone(state: str, memory: Memory, limits: Limits) -> tuple[Step, Memory]:
    memory = replace(memory, started=None)
    if state == "FAILED":
        memory = replace(memory, failed_requests=memory.failed_requests + 1)
        if memory.failed_requests > limits.failed_requests:
            say = (
                f"the request FAILED {memory.failed_requests} times without ever being served; "
                "gcloud's describe says why (quota, zone, accelerator)"
            )
            return Step("end", say, code=ResourceError.exit_code), memory
    pause = min(POLL_SECONDS * 2**memory.failed_requests, _LONGEST_PAUSE_SECONDS)
    return Step("delete", f"the slices are {state}; asking again", pause), memory


def _unanswered(memory: Memory, limits: Limits) -> tuple[Step, Memory]:
    memory = replace(memory, unanswered=memory.unanswered + 1)
    if memory.unanswered > limits.unanswered:
        say = f"no answer from every worker {memory.unanswered} times; asking for other slices"
        return Step("delete", say, POLL_SECONDS), replace(memory, unanswered=0, started=None)
    return Step("wait", "not every worker answers", POLL_SECONDS), memory


def _active(seen: Seen, memory: Memory, revision: str, limits: Limits) -> tuple[Step, Memory]:
    states = {worker.state for worker in seen.workers}
    if any(one.state != "running" and one.revision != revision for one in seen.workers):
        memory = replace(memory, setups=memory.setups + 1)
        if memory.setups > limits.setups:
            say = f"setting up failed {limits.setups} times; the output above says why"
            return Step("end", say, code=ConfigError.exit_code), memory
        return Step("setup", "setting up the workers"), memory
    memory = replace(memory, setups=0)
    if states == {"running"}:
        started = seen.now if memory.started is None else memory.started
        healthy = seen.now - started >= limits.healthy_seconds
        memory = replace(
            memory, started=started, stragglers=0, restarts=0 if healthy else memory.restarts
        )
        return Step("wait", "running", POLL_SECONDS), memory
    if memory.started is None:
        # What ended before this babysitter came says nothing of what it starts; the same command
        # resumes a run, or reports a finished one.
        return Step("start", "starting"), replace(memory, started=seen.now)
    if "idle" in states:
        return _again("not started everywhere", "", 1, memory, seen.now, limits)
    if "running" in states:
        memory = replace(memory, stragglers=memory.stragglers + 1)
        if memory.stragglers > limits.stragglers:
            say = "some processes have ended and others run on; stopping them"
            return Step("stop", say, POLL_SECONDS), replace(memory, stragglers=0)
        return Step("wait", "some processes have ended", POLL_SECONDS), memory
    return _ended(seen.workers, replace(memory, stragglers=0), seen.now, limits)


def _ended(
    workers: Sequence[Worker], memory: Memory, now: float, limits: Limits
) -> tuple[Step, Memory]:
    codes = [one.code for one in workers]
    verdict = outcome(codes)
    if verdict == "done":
        return Step("end", "done"), memory
    shown = ", ".join(f"{one.host} {one.code}" for one in workers if one.code)
    if verdict == "fail":
        code = next(code for code in codes if code and outcome([code]) == "fail")
        return Step("end", f"failed, and would again: {shown}", code=code), memory
    return _again("ended", shown, next(filter(None, codes)), memory, now, limits)


def _again(
    what: str, shown: str, code: int, memory: Memory, now: float, limits: Limits
) -> tuple[Step, Memory]:
    """Another start, after a pause that doubles."""
    what += f" ({shown})" if shown else ""
    if memory.restarts >= limits.restarts:
        return Step("end", f"{what}; gave up after {memory.restarts} restarts", code=code), memory
    pause = min(POLL_SECONDS * 2**memory.restarts, _LONGEST_PAUSE_SECONDS)
    memory = replace(memory, restarts=memory.restarts + 1, started=now + pause)
    return Step("start", f"{what}; starting again", pause), memory


def read_resource(text: str) -> str:
    """The state in what gcloud's describe prints as JSON."""
    try:
        return str(json.loads(text)["state"]["state"])
    except (ValueError, KeyError, TypeError):
        return "STATE_UNSPECIFIED"


def read_workers(text: str) -> tuple[Worker, ...]:
    """The workers' words in the output of `worker.sh status` on all of them."""
    return tuple(
        Worker(host, revision, state, int(code or 0))
        for host, revision, state, code in _STATUS.findall(text)
    )
