"""Whether all processes of a run do the same thing.

Each process names what it is about to do. Hashes of that are exchanged; only where they differ are
the values shown, once for each group of processes that agree. All of it goes through the service
that jax's processes start by, from host to host: no program is compiled, the devices' queues are
not touched, and processes that would compile different programs can still be compared.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from arcticjax import errors
from arcticjax.parallel import distributed

_ROOT = "arcticjax/fingerprint"
# Differing values shown at most, and characters of each.
_SHOWN = 12
_LONGEST = 80
# Checks are told apart by their number: all processes make the same checks in the same order.
_numbers = itertools.count()


def check(
    when: str, values: Callable[[], Mapping[str, Any]], *, patience_seconds: float = 600
) -> None:
    """Raises ConfigError on every process where `values()`, plain and maybe nested, differ between
    processes; one process alone does nothing.

    when: which moment of the run this is, for the message. All processes must make the same checks
    in the same order; PeerLost is raised where one does not come within `patience_seconds`.
    """
    count, rank = jax.process_count(), jax.process_index()
    if count == 1:
        return
    client, number = distributed.coordination_service(), next(_numbers)
    folder = f"{_ROOT}/{number}"
    text = json.dumps(values(), sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    wait = int(1000 * patience_seconds)

    client.key_value_set(f"{folder}/hash/{rank}", f"{digest} {socket.gethostname()}")
    try:
        client.wait_at_barrier(f"{folder}/hash", timeout_in_ms=wait)
    except jax.errors.JaxRuntimeError as problem:
        raise errors.PeerLost(
            _missing(
                when, distributed.by_process(client, f"{folder}/hash"), count, patience_seconds
            )
        ) from problem
    answers = distributed.by_process(client, f"{folder}/hash")
    groups: dict[str, list[int]] = {}
    hosts = []
    for process in range(count):
        found, _, host = answers[process].partition(" ")
        groups.setdefault(found, []).append(process)
        hosts.append(host)
    # All have read the check before this one, or they would not be here.
    if rank == 0 and number:
        client.key_value_delete(f"{_ROOT}/{number - 1}")
    if len(groups) == 1:
        return

    # One of each group speaks for it: a pod's worth of equal configs need not be sent.
    if rank == groups[digest][0]:
        client.key_value_set(f"{folder}/values/{rank}", text)
    told = [
        (group, json.loads(client.blocking_key_value_get(f"{folder}/values/{group[0]}", wait)))
        for group in groups.values()
    ]
    raise errors.ConfigError(difference(when, told, hosts))


def difference(
    when: str, told: Sequence[tuple[Sequence[int], Mapping[str, Any]]], hosts: Sequence[str]
) -> str:
    """Says which processes are the odd ones and what differs.

    told: groups of processes that agree, with their values; the groups' values differ. hosts: the
    host of each process. The odd ones are those outside a majority; without one, nobody can tell.
    """
    told = sorted(told, key=lambda one: (-len(one[0]), min(one[0])))
    groups = [list(group) for group, _ in told]
    majority = len(groups[0]) > len(hosts) / 2
    if majority:
        odd = sorted(itertools.chain(*groups[1:]))
        head = (
            f"{when}: {_processes(odd, hosts)} differ{'s' if len(odd) == 1 else ''} from the other "
            f"{len(groups[0])}"
        )
    else:
        head = f"{when}: {_processes(range(len(hosts)), hosts)} differ from one another"
    flat = [flatten(values) for _, values in told]
    names = [
        name
        for name in sorted(set(itertools.chain(*flat)))
        if any(one.get(name, _ABSENT) != flat[0].get(name, _ABSENT) for one in flat)
    ]
    lines = [f"\n  {name}: {_by_value(name, groups, flat)}" for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        lines.append(f"\n  and {len(names) - _SHOWN} more")
    return (
        f"{head}:{''.join(lines)}\n"
        "All processes of a run must do the same: start each with the same config, code and data"
    )


_ABSENT = object()


def _by_value(name: str, groups: list[list[int]], flat: list[dict[str, Any]]) -> str:
    """`4 in process 2, 3 in processes 0, 1, 3`, the fewest first."""
    having: dict[str, list[int]] = {}
    for group, values in zip(groups, flat, strict=True):
        value = values.get(name, _ABSENT)
        shown = "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
        if len(shown) > _LONGEST:
            shown = shown[:_LONGEST] + "..."
        having.setdefault(shown, []).extend(group)
    return "; ".join(
        f"{shown} in {_processes(sorted(group))}"
        for shown, group in sorted(having.items(), key=lambda one: (len(one[1]), one[1]))
    )


def _processes(ranks: Sequence[int], hosts: Sequence[str] | None = None) -> str:
    named = [f"{rank} ({hosts[rank]})" if hosts else str(rank) for rank in ranks]
    shown = ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
    return f"process{'' if len(named) == 1 else 'es'} {shown}"


def flatten(values: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested plain values by dotted path."""
    if isinstance(values, Mapping):
        pairs = list(values.items())
    elif isinstance(values, list) and values:
        pairs = list(enumerate(values))
    else:
        return {path: values}
    leaves: dict[str, Any] = {}
    for key, value in pairs:
        leaves |= flatten(value, f"{path}.{key}" if path else str(key))
    return leaves


def _missing(when: str, answers: Mapping[int, str], count: int, seconds: float) -> str:
    absent = [process for process in range(count) if process not in answers]
    if not absent:
        return f"{when}: the processes lost one another; see the other processes' output"
    return (
        f"{when}: {_processes(absent)} of {count} did not come within {seconds:g} s; the output "
        "over there says why. The same command, given to all processes, resumes the run"
    )


@functools.cache
def code_version() -> dict[str, str]:
    """What a run is computed by: this package's version and the hash of its sources, jax, numpy."""
    folder = Path(__file__).parents[1]
    try:
        version = importlib.metadata.version("arcticjax")
    except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
        version = "unknown"
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder).as_posix()}\n".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return {
        "arcticjax": version,
        "sources": digest.hexdigest()[:16],
        "jax": jax.__version__,
        "numpy": np.__version__,
    }
