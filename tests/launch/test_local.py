"""Several processes on one machine: their environment, their output, and how they end."""

import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from arcticjax.errors import ConfigError
from launch import local

RANK = "import os; rank = int(os.environ['ARCTICJAX_PROCESS']); "


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def test_each_process_is_told_where_the_others_are():
    out = io.StringIO()
    names = "('COORDINATOR', 'PROCESSES', 'PROCESS')"
    code = f"import os; print(*(os.environ['ARCTICJAX_' + name] for name in {names}))"
    assert local.launch(python(code), 3, out=out) == 0
    said = sorted(out.getvalue().splitlines())
    ports = {re.fullmatch(rf"\[{n}\] localhost:(\d+) 3 {n}", said[n])[1] for n in range(3)}
    assert len(ports) == 1


def test_gpus_are_dealt_out():
    given = [one["CUDA_VISIBLE_DEVICES"] for one in local.environments(2, gpus_each=2)]
    assert given == ["0,1", "2,3"]


def test_lines_are_whole_and_carry_their_process():
    """Also the last one, without an end, and what is no UTF-8."""
    out = io.StringIO()
    code = (
        RANK
        + r"""
import sys
for n in range(200):
    print(rank, n, "x" * 300, flush=True)
sys.stdout.buffer.write(b"\xff end")
"""
    )
    assert local.launch(python(code), 2, out=out) == 0
    for rank in (0, 1):
        lines = [x for x in out.getvalue().splitlines() if x.startswith(f"[{rank}] ")]
        expected = [f"[{rank}] {rank} {n} " + "x" * 300 for n in range(200)]
        assert lines == [*expected, f"[{rank}] \ufffd end"]


def test_the_first_failure_ends_the_rest_and_gives_the_code():
    """Process 1 fails; process 0 ignores SIGTERM, so it takes SIGKILL."""
    code = (
        RANK
        + """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 1:
    time.sleep(0.5)
    sys.exit(5)
time.sleep(600)
"""
    )
    assert local.launch(python(code), 2, grace_seconds=0.3, out=io.StringIO()) == 5


def test_a_process_that_ends_by_itself_in_time_is_left_to():
    """A peer that notices may still say why; the code is that of the first."""
    out = io.StringIO()
    code = (
        RANK
        + """
import sys, time
if rank == 0:
    sys.exit(3)
time.sleep(1)
print("last words")
sys.exit(141)
"""
    )
    assert local.launch(python(code), 2, out=out) == 3
    assert "[1] last words\n" in out.getvalue()


def test_a_killed_process_gives_the_code_that_a_shell_gives():
    code = "import os; os.kill(os.getpid(), 9)"
    assert local.launch(python(code), 1, out=io.StringIO()) == 137


def test_what_a_process_started_ends_with_it(tmp_path):
    file = tmp_path / "pid"
    code = f"""
import pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({str(file)!r}).write_text(str(child.pid))
sys.exit(4)
"""
    assert local.launch(python(code), 1, grace_seconds=1, out=io.StringIO()) == 4
    assert _ended(int(file.read_text()))


def test_sigterm_reaches_every_process():
    """As a preempted machine sends it; here each saves and exits 42."""
    code = (
        RANK
        + """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", rank, flush=True), sys.exit(42)))
print("ready", flush=True)
time.sleep(600)
"""
    )
    command = [sys.executable, "-m", "launch.local", "--processes", "2", "--", *python(code)]
    process = subprocess.Popen(command, cwd=local.__file__[: -len("/launch/local.py")],
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    said = ""
    while said.count("ready") < 2:
        line = process.stdout.readline()
        assert line, said
        said += line
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 42
    assert sorted(rest.splitlines()) == ["[0] saved 0", "[1] saved 1"]


def test_a_run_outlives_who_reads_its_output():
    """As with `| head`, or a terminal that is closed."""
    code = (
        RANK
        + """
import sys
print("first", flush=True)
for _ in range(5000):
    print("x" * 100)
sys.exit(5)
"""
    )
    command = [sys.executable, "-m", "launch.local", "--processes", "1", "--", *python(code)]
    process = subprocess.Popen(command, cwd=local.__file__[: -len("/launch/local.py")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)  # fmt: skip
    assert process.stdout.readline() == "[0] first\n"
    process.stdout.close()
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (5, "")


def test_a_command_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="no-such-program --x: cannot be started: No such file"):
        local.launch(["no-such-program", "--x"], 1)


def test_the_dry_run_prints_what_would_run(capsys):
    local.main(["--processes", "2", "--gpus-each", "1", "--dry-run", "--", "a", "b c", "$d"])
    said = re.sub(r"localhost:\d+", "localhost:PORT", capsys.readouterr().out)
    assert said == "".join(
        f"env ARCTICJAX_COORDINATOR=localhost:PORT ARCTICJAX_PROCESSES=2 ARCTICJAX_PROCESS={n} "
        f"CUDA_VISIBLE_DEVICES={n} a 'b c' '$d'\n"
        for n in range(2)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0", "--", "a"], "--processes: 0 is not 1 or more"),
        (["--processes", "2"], "required: COMMAND"),
        (["--processes", "1", "--grace-seconds", "nan", "--", "a"], "at most"),
        (["--processes", "1", "--", "a", "hf_" + "x" * 20], "looks like a secret"),
    ],
)
def test_wrong_usage_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        local.main(arguments)


def _ended(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False
