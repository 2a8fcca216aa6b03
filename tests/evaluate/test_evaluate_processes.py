"""An evaluation over two processes: as by one, and what follows when one is lost."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from arcticjax.evaluate import __main__ as command
from arcticjax.evaluate import tasks
from launch.local import environments
from tests import tiny
from tests.train.running import ROOT, finish

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiler")]

# What process 1 does instead of scoring; "score" is to score.
PROGRAM = """
    import os, signal, sys
    from arcticjax import errors
    from arcticjax.evaluate import __main__, tasks
    from arcticjax.parallel import command

    tasks.has_mteb = lambda: False
    if os.environ["ARCTICJAX_PROCESS"] == "1" and sys.argv[1] != "score":
        tasks.score = lambda *_: os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    errors.run_cli(lambda: __main__.main(sys.argv[2:]), leave=command.leave)
"""


def options(folder, devices: int) -> list[str]:
    changes = {"run.directory": str(folder / "model"), "mesh.data": devices}
    file = tiny.run_config(folder, **changes, **{"mesh.peer_seconds": 3})
    return ["--config", str(file), "--output", str(folder / f"out-{devices}")]


def both(folder, what: str) -> list[subprocess.Popen]:
    arguments = [what, *options(folder, 2)]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    return [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), *arguments],
            env={**os.environ, "PYTHONPATH": ROOT, "XLA_FLAGS": flags, **one},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for one in environments(2)
    ]


def test_two_processes_score_as_one(tmp_path, monkeypatch):
    for process in both(tmp_path, "score"):
        finish(process)
    monkeypatch.setattr(tasks, "has_mteb", lambda: False)
    assert command.main(options(tmp_path, 1)) == 0
    two, one = (json.loads((tmp_path / f"out-{n}" / "results.json").read_text()) for n in (2, 1))
    assert two["task"] == pytest.approx(one["task"], abs=1e-6)
    assert two["revision"] == one["revision"]


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_the_other_of_a_lost_process_ends_with_141_and_its_stacks(tmp_path, how):
    first, second = both(tmp_path, how)
    try:
        assert "no sign of life from process 1 of 2" in finish(first, 141).splitlines()[-1]
    finally:
        second.send_signal(signal.SIGKILL)
        second.communicate()
    assert "Thread" in (tmp_path / "out-2" / "stacks_process_0.txt").read_text()
