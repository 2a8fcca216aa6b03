"""Which ends of a run are worth another start."""

import re
from pathlib import Path

import pytest

from arcticjax import errors
from launch.exit_codes import RESTART, outcome

PAGE = Path(__file__).resolve().parents[2] / "docs" / "exit_codes.md"


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], "done"),
        ([42, 42], "restart"),
        ([0, 141], "restart"),
        ([141, 137, 134], "restart"),
        ([142], "restart"),
        ([2, 141], "fail"),
        ([42, 5], "fail"),
        ([8], "fail"),
        ([1], "fail"),
        ([127], "fail"),
    ],
)
def test_the_worst_process_decides(codes, expected):
    assert outcome(codes) == expected


def test_every_error_of_the_package_is_sorted():
    for error in errors.ArcticError.__subclasses__():
        restart = error in (errors.Preempted, errors.PeerLost) or error.exit_code == 142
        assert (error.exit_code in RESTART) is restart, error


def test_the_page_says_the_same():
    [codes] = re.findall(r"`launch.exit_codes` restarts after ([\d, and]+)", PAGE.read_text())
    assert {int(code) for code in re.findall(r"\d+", codes)} == RESTART
