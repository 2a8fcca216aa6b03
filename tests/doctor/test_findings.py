"""Findings of one process and of many, as a table and as an exit code."""

import pytest

from arcticjax import errors
from arcticjax.doctor.findings import Finding, attempt, exit_code, merge, skipped, table

GOOD = Finding("a", "ok", "fine")
FULL = Finding("b", "fail", "the disk is full", "make room", resource=True)
WRONG = Finding("c", "fail", "wrong")


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        ([GOOD], 0),
        ([GOOD, Finding("w", "warn", "x"), skipped("s", "a")], 0),
        ([GOOD, FULL], 8),
        ([FULL, WRONG], 2),
    ],
)
def test_the_exit_code_is_8_only_where_room_alone_is_missing(findings, code):
    assert exit_code(findings) == code


def test_what_a_check_raises_is_a_finding():
    def fails(error):
        def look():
            raise error

        return attempt("x", look)

    assert attempt("x", lambda: "fine") == Finding("x", "ok", "fine")
    assert fails(errors.DataError("no file y")) == Finding("x", "fail", "no file y")
    assert fails(errors.ResourceError("full")).resource
    other = fails(ValueError("first\nsecond"))
    assert other.found == "ValueError: first" and other.status == "fail" and other.advice


def test_what_all_processes_found_is_one_row():
    assert merge([[GOOD, FULL], [GOOD, FULL]], ["h0", "h1"]) == [GOOD, FULL]


def test_what_they_found_unlike_names_them():
    other = Finding("a", "fail", "broken", "mend it")
    rows = merge([[GOOD], [other], [GOOD]], ["h0", "h1", "h2"])
    assert rows == [
        Finding("a", "ok", "fine (process 0, h0, one of 2)"),
        Finding("a", "fail", "process 1 (h1): broken", "mend it"),
    ]


def test_what_is_well_everywhere_is_one_row_though_measured_unlike():
    timed = [[Finding("t", "ok", f"took {n}", seconds=n)] for n in (1.0, 3.0, 2.0)]
    [row] = merge(timed, ["h0", "h1", "h2"])
    assert row.found == "took 3.0 (process 1, h1, the slowest of 3)"
    sizes = [[Finding("s", "ok", f"{n} GiB")] for n in range(100)]
    [row] = merge(sizes, [f"h{n}" for n in range(100)])
    assert row.found == "0 GiB (process 0, h0, one of 100)"


def test_many_processes_are_counted():
    bad = [[Finding("a", "fail", "broken")] for _ in range(6)]
    row = merge([[GOOD], *bad], [f"h{n}" for n in range(7)])[1]
    assert row.found == "process 1 (h1), 2 (h2), 3 (h3), 4 (h4) and 2 more: broken"


def test_a_check_that_only_some_made_is_kept():
    assert merge([[GOOD, WRONG], [GOOD]], ["h0", "h1"]) == [
        GOOD,
        Finding("c", "fail", "process 0 (h0): wrong"),
    ]


def test_rows_are_wrapped_and_say_what_to_do():
    long = Finding("long check", "fail", "word " * 40, "do this")
    lines = table([GOOD, long]).splitlines()
    assert lines[0] == "a           ok       fine"
    assert lines[1].startswith("long check  fail     word word")
    assert lines[-1].endswith("-> do this") and all(len(line) <= 100 for line in lines)
    assert all(line.startswith(" " * 21) for line in lines[2:])
