"""What a check found, and all findings as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from arcticjax.errors import ArcticError, ConfigError, ResourceError

Status = Literal["ok", "warn", "fail", "skipped"]

_WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, how it is, what was seen, and what to do about it.

    resource: whether a failure is one of room (disk, memory, permissions) rather than of
    configuration. seconds: what the check measured, if it measured a time.
    """

    check: str
    status: Status
    found: str
    advice: str = ""
    resource: bool = False
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the JSON output."""
        return asdict(self)


def attempt(check: str, look: Callable[[], Finding | str]) -> Finding:
    """What `look` finds: its finding, the text of a good one, or the error it raises as a
    failure."""
    try:
        found = look()
    except ArcticError as error:
        # The messages of this package say what to do as well.
        return Finding(check, "fail", str(error), resource=isinstance(error, ResourceError))
    except Exception as error:  # a library's, of any class: the other checks are still of use
        lines = str(error).strip().splitlines() or [""]
        return Finding(
            check,
            "fail",
            f"{type(error).__name__}: {lines[0][:300]}",
            "unexpected; run python -m arcticjax.train on the same config for the whole trace",
        )
    return Finding(check, "ok", found) if isinstance(found, str) else found


def skipped(check: str, because: str) -> Finding:
    """A check that another one's failure makes impossible."""
    return Finding(check, "skipped", f"because {because} failed")


def exit_code(findings: Iterable[Finding]) -> int:
    """0 where nothing failed, 8 where only room is missing, else 2."""
    failed = [one for one in findings if one.status == "fail"]
    if not failed:
        return 0
    return ResourceError.exit_code if all(one.resource for one in failed) else ConfigError.exit_code


def merge(by_process: Sequence[Sequence[Finding]], hosts: Sequence[str]) -> list[Finding]:
    """The findings of all processes as one list, in the order of the checks.

    A check that is well everywhere is one row: what all say, or what the slowest or first says.
    Every other answer is a row that names its processes. Each process makes a check once.
    """
    merged: list[Finding] = []
    for check in dict.fromkeys(one.check for findings in by_process for one in findings):
        told = [
            (process, one)
            for process, findings in enumerate(by_process)
            for one in findings
            if one.check == check
        ]
        good = [(process, one) for process, one in told if one.status == "ok"]
        if good:
            merged.append(_good(good, hosts))
        groups: dict[Finding, list[int]] = {}
        for process, one in told:
            if one.status != "ok":
                groups.setdefault(one, []).append(process)
        for one, members in groups.items():
            if len(members) < len(by_process):
                one = replace(one, found=f"process {_named(members, hosts)}: {one.found}")
            merged.append(one)
    return merged


def _good(good: Sequence[tuple[int, Finding]], hosts: Sequence[str]) -> Finding:
    process, one = max(good, key=lambda told: told[1].seconds or 0.0)
    if len(good) == len(hosts) and len({other.found for _, other in good}) == 1:
        return one
    rest = "the slowest" if one.seconds is not None else "one"
    return replace(
        one, found=f"{one.found} (process {process}, {hosts[process]}, {rest} of {len(good)})"
    )


def _named(members: Sequence[int], hosts: Sequence[str]) -> str:
    named = ", ".join(f"{member} ({hosts[member]})" for member in members[:4])
    return named + (f" and {len(members) - 4} more" if len(members) > 4 else "")


def table(findings: Sequence[Finding]) -> str:
    """A row for each finding, wrapped, with the advice below what needs it."""
    widest = max(len(one.check) for one in findings)
    rows = []
    for one in findings:
        head = f"{one.check:<{widest}}  {one.status:<7}  "
        text = f"{one.found} -> {one.advice}" if one.advice else one.found
        lines = [
            wrapped
            for line in text.splitlines()
            for wrapped in textwrap.wrap(
                line,
                _WIDTH - len(head),
                break_long_words=False,
                break_on_hyphens=False,
                subsequent_indent="  " if line.startswith(" ") else "",
            )
        ] or [""]
        rows.append(f"\n{' ' * len(head)}".join([head + lines[0], *lines[1:]]))
    return "\n".join(rows)
