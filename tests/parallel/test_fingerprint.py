"""Which process is the odd one, and how the others hear of it."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from arcticjax.parallel import fingerprint

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ["a", "b", "c", "d", "e"]
SAME = {"run": {"seed": 3}, "data": {"sources": [{"name": "x"}]}, "jax": "1"}


def said(*told, hosts=HOSTS) -> list[str]:
    """The message's lines but the last, which is advice."""
    *lines, advice = fingerprint.difference("at the start", told, hosts).splitlines()
    assert advice.startswith("All processes of a run must do the same")
    return lines


def test_a_majority_names_the_odd_process():
    assert said(([3], {**SAME, "run": {"seed": 4}}), ([0, 1, 2, 4], SAME)) == [
        "at the start: process 3 (d) differs from the other 4:",
        "  run.seed: 4 in process 3; 3 in processes 0, 1, 2, 4",
    ]


def test_of_two_processes_neither_is_the_odd_one():
    assert said(([0], {"seed": 3}), ([1], {"seed": 4}), hosts=HOSTS[:2]) == [
        "at the start: processes 0 (a), 1 (b) differ from one another:",
        "  seed: 3 in process 0; 4 in process 1",
    ]


def test_several_odd_ones_and_several_values():
    other = {"run": {"seed": 4}, "data": {"sources": [{"name": "y"}]}, "jax": "1"}
    assert said(([0, 2, 3], SAME), ([1], other), ([4], {**SAME, "jax": "2"})) == [
        "at the start: processes 1 (b), 4 (e) differ from the other 3:",
        '  data.sources.0.name: "y" in process 1; "x" in processes 0, 2, 3, 4',
        '  jax: "2" in process 4; "1" in processes 0, 1, 2, 3',
        "  run.seed: 4 in process 1; 3 in processes 0, 2, 3, 4",
    ]


def test_half_is_no_majority():
    lines = said(([0, 1], {"seed": 3}), ([2, 3], {"seed": 4}), hosts=HOSTS[:4])
    assert lines[0].endswith("processes 0 (a), 1 (b), 2 (c), 3 (d) differ from one another:")
    assert lines[1] == "  seed: 3 in processes 0, 1; 4 in processes 2, 3"


def test_what_only_one_process_has_is_said_to_be_absent_elsewhere():
    lines = said(([0, 1], {"sources": []}), ([2], {"sources": ["x"]}), hosts=HOSTS[:3])
    assert lines[1:] == [
        "  sources: absent in process 2; [] in processes 0, 1",
        '  sources.0: "x" in process 2; absent in processes 0, 1',
    ]


def test_a_long_message_stays_readable():
    """Of many values some are shown, of a long one the beginning; many processes are counted."""
    ours = {f"v{n:02}": "x" * 500 for n in range(20)}
    theirs = {name: "y" + value for name, value in ours.items()}
    hosts = ["h"] * 64
    lines = said((list(range(40)), ours), (list(range(40, 64)), theirs), hosts=hosts)
    assert lines[-1] == "  and 8 more" and len(lines) == 14
    assert "processes 40 (h), 41 (h)" in lines[0] and "47 (h) and 16 more differ" in lines[0]
    assert max(map(len, lines)) < 400


def test_one_process_alone_computes_nothing():
    fingerprint.check("at the start", lambda: pytest.fail("not needed"))


def test_the_code_version_is_that_of_the_sources():
    found = fingerprint.code_version()
    assert set(found) == {"arcticjax", "sources", "jax", "numpy"}
    assert len(found["sources"]) == 16


WORKER = """
    import os, sys, time
    import jax
    from arcticjax import errors
    from arcticjax.parallel import distributed, fingerprint

    port, folder = sys.argv[1:]

    def raised(kind, when, values, **options):
        try:
            fingerprint.check(when, lambda: values, **options)
        except kind as error:
            return str(error)
        raise AssertionError(f"no {kind.__name__}")

    def work(rank):
        jax.distributed.initialize(f"localhost:{port}", 4, rank)
        for _ in range(30):  # none may clear away what another has yet to read
            fingerprint.check("first", lambda: {"seed": 3, "nested": {"a": (1, 2)}})
        print(raised(errors.ConfigError, "second", {"seed": 4 if rank == 2 else 3}))
        fingerprint.check("third", lambda: {"seed": 3})
        if rank == 3:
            time.sleep(1.5)
        print(raised(errors.PeerLost, "fourth", {}, patience_seconds=0.5 if rank < 3 else 60))
        try:
            fingerprint.check("last", lambda: {"rank": rank // 2})
        finally:
            time.sleep(rank / 3)  # process 0, whose end kills the others, would be gone long since

    # Forked before jax starts anything: importing it takes longer than all the rest.
    children = []
    for rank in range(4):
        children.append(os.fork())
        if not children[-1]:
            sys.stdout = sys.stderr = open(f"{folder}/{rank}", "w")
            errors.run_cli(lambda: work(rank), leave=distributed.leave)
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each of four processes said."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WORKER), port, str(folder)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = [(folder / str(rank)).read_text() for rank in range(4)]
    assert done.stdout == "[2, 2, 2, 2]\n", "\n".join([done.stdout, done.stderr, *said])
    return said


def test_every_process_hears_which_one_is_odd(outputs):
    host = socket.gethostname()
    for output in outputs:
        assert f"second: process 2 ({host}) differs from the other 3:" in output
        assert "\n  seed: 4 in process 2; 3 in processes 0, 1, 3\n" in output


def test_a_process_that_does_not_come_is_named(outputs):
    for output in outputs[:3]:
        assert "fourth: process 3 of 4 did not come within 0.5 s" in output
    assert "fourth: the processes lost one another" in outputs[3]


def test_every_process_says_why_it_ends(outputs):
    for output in outputs:
        assert "error: last: processes 0 (" in output
        assert "\n  rank: 0 in processes 0, 1; 1 in processes 2, 3\n" in output
