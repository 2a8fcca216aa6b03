"""SkyPilot's task files: its own parser takes them, and a task's processes find each other."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from launch.exit_codes import RESTART

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch" / "skypilot"
TASKS = sorted(FOLDER.glob("*.yaml"))

_PARSE = """
import sys
import sky
for file in sys.argv[1:]:
    task = sky.Task.from_yaml(file)
    [resources] = task.resources
    print(file, task.num_nodes, resources.accelerators, resources.use_spot)
try:
    sky.Task.from_yaml_config({"name": "x", "run": "x", "resorces": {}})
except Exception as error:
    assert "resorces" in str(error), error
else:
    raise SystemExit("an unknown field was taken")
"""


@pytest.mark.parametrize("file", TASKS, ids=lambda file: file.name)
def test_a_job_is_recovered_after_what_the_other_launchers_restart(file):
    task = yaml.safe_load(file.read_text())
    recovery = task["resources"]["job_recovery"]
    assert set(recovery["recover_on_exit_codes"]) == RESTART
    assert recovery["max_restarts_on_errors"] == 0
    # Its processes are started by run.sh, and the scripts exist where the work folder is.
    assert task["workdir"] == "."
    for field in ("setup", "run"):
        assert (ROOT / task[field].split()[1]).is_file()
    assert "secrets" not in task


def test_processes_are_told_where_the_others_are(tmp_path):
    words = ["a b", "it's", "$HOME"]
    names = ("COORDINATOR", "PROCESSES", "PROCESS")
    show = "; ".join(f"echo $ARCTICJAX_{name}" for name in names)
    done = subprocess.run(
        ["bash", FOLDER / "run.sh", "bash", "-c", f'{show}; printf "%s\\n" "$@"', "x", *words],
        cwd=tmp_path,
        env={**os.environ, "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6", "SKYPILOT_NUM_NODES": "2",
             "SKYPILOT_NODE_RANK": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["10.0.0.5:8476", "2", "1", *words]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_skypilots_own_parser_takes_them(tmp_path):
    """In an environment of its own: its pins are not ours."""
    done = subprocess.run(
        ["uv", "run", "--isolated", "--no-project", "--with", "skypilot==0.14.1",
         "python", "-c", _PARSE, *map(str, TASKS)],
        cwd=ROOT, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tpu.yaml 1 {'tpu-v6e-16': 1} True" in done.stdout, done.stdout
    assert "gpu.yaml 2 {'H100': 8} True" in done.stdout
