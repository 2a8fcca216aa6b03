"""Slurm jobs: the commands that would run, and a real cluster of one node that preempts a run."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from arcticjax.errors import ConfigError
from launch import local
from launch.exit_codes import RESTART
from launch.slurm import __main__ as command
from launch.slurm.__main__ import SCRIPT, SlurmSpec
from launch.specs import load
from tests import tiny
from tests.launch import golden, slurm_cluster
from tests.train.running import BARE, ROOT, lines, losses, same, weights

VERBS = ("submit", "status", "logs", "stop", "delete")


def spec_file(folder: Path, **changes: object) -> Path:
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump({"name": "job", "command": ["python", "x"], **changes}))
    return file


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_dry_runs(verb, kind, tmp_path, capsys):
    changes: dict = {}
    if kind == "gpu":
        secrets = tmp_path / "env"
        secrets.write_text("HF_TOKEN=canary\n")
        secrets.chmod(0o600)
        changes = {
            "nodes": 2,
            "gpus_per_node": 8,
            "cpus_per_task": 8,
            "memory_per_node": "64G",
            "time": "1-00:00:00",
            "partition": "a100",
            "account": "me",
            "constraint": "ib&nvme",
            "flags": "gpu",
            "env_file": str(secrets),
            "command": ["python", "it's", "$HOME", "a b"],
        }
    assert command.main([verb, str(spec_file(tmp_path, **changes)), "--dry-run"]) == 0
    said = capsys.readouterr().out.replace(str(tmp_path), "TMP").replace(ROOT, "ROOT")
    golden.check(f"slurm-{kind}-{verb}.txt", said)


@pytest.mark.parametrize("name", ["gpu.yaml", "cpu.yaml"])
def test_the_examples_are_jobs(name):
    assert load(SCRIPT.with_name(name), SlurmSpec).nodes >= 1


def test_the_script_puts_back_what_the_other_launchers_restart():
    [codes] = re.findall(r"^    0 \| ([\d |]+)\) ;;$", SCRIPT.read_text(), re.MULTILINE)
    assert {int(code) for code in codes.split("|")} == RESTART


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "nodes"),
        ({"time": "soon"}, "time: String should match"),
        ({"memory_per_node": "lots"}, "memory_per_node"),
        ({"gpu": 1}, "gpu: Extra inputs"),
    ],
)
def test_wrong_specs_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load(spec_file(tmp_path, **changes), SlurmSpec)


STUBS = {
    # As srun does: every task with its number; the highest code.
    "srun": """
while [ "${1#--}" != "$1" ]; do shift; done
worst=0
for SLURM_PROCID in 0 1; do
  export SLURM_PROCID
  "$@" || { code=$?; if [ $code -gt $worst ]; then worst=$code; fi; }
done
exit $worst
""",
    "scontrol": 'echo "$@" > scontrol.said',
    "sleep": ":",
}


def play(folder: Path, first: int, second: int, *, restarts: int = 0, words=()) -> tuple[int, bool]:
    """The script's exit code, and whether it asked for a requeue, for tasks that end so."""
    for name, text in STUBS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (folder / name).chmod(0o755)
    program = (
        'printf "%s\\n" "$@" > told-$SLURM_PROCID; '
        f"if [ $SLURM_PROCID = 0 ]; then exit {first}; else exit {second}; fi"
    )
    code = subprocess.run(
        ["bash", str(SCRIPT), "3", "-", "bash", "-c", program, "program", *words],
        cwd=folder,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_NTASKS": "2",
             "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7",
             "SLURM_RESTART_COUNT": str(restarts)},
        check=False,
    ).returncode  # fmt: skip
    return code, (folder / "scontrol.said").exists()


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0), (0, False)), ((42, 42), (42, True)), ((141, 137), (141, True)),
     ((2, 141), (2, False)), ((143, 5), (5, False)), ((1, 0), (1, False))],
)  # fmt: skip
def test_what_the_script_makes_of_its_tasks_ends(codes, expected, tmp_path):
    assert play(tmp_path, *codes) == expected


def test_the_script_gives_up_after_so_many_restarts(tmp_path):
    assert play(tmp_path, 42, 42, restarts=3) == (42, False)


def test_words_reach_every_task_as_they_are(tmp_path):
    words = ["a b", "it's", "$HOME", "$(id)", "*", '"', "\\"]
    assert play(tmp_path, 0, 0, words=words) == (0, False)
    for n in (0, 1):
        assert (tmp_path / f"told-{n}").read_text().splitlines() == words


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.skipif(slurm_cluster.missing() is not None, reason=str(slurm_cluster.missing()))
def test_a_preempted_run_is_requeued_and_ends_bit_for_bit_like_an_unbroken_one(tmp_path):
    """Two tasks on a real cluster; a job of a more urgent partition sends them away."""
    fields = {"train.total_steps": 600, "checkpoint.save_every_steps": 1000, "mesh.data": "auto"}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    environment = {**os.environ, "PYTHONPATH": ROOT,
                   "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}  # fmt: skip
    words = [sys.executable, "-m", "arcticjax.train", "--config"]
    file = tiny.run_config(straight, **fields, **BARE)
    assert local.launch([*words, str(file)], 2, environment=environment) == 0

    file = tiny.run_config(broken, **fields, **BARE)
    spec = spec_file(broken, nodes=1, tasks_per_node=2, command=[*words, str(file)])
    (tmp_path / "slurm").mkdir()
    with slurm_cluster.cluster(tmp_path / "slurm") as slurm:
        slurm |= {name: environment[name] for name in ("PYTHONPATH", "XLA_FLAGS")}

        def run(*command: str) -> str:
            done = subprocess.run(command, env=slurm, cwd=broken, capture_output=True, text=True,
                                  check=False)  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout

        submit = [sys.executable, "-m", "launch.slurm", "submit", str(spec)]
        job = re.search(r"Submitted batch job (\d+)", run(*submit))[1]
        assert "in the queue already" in run(*submit)
        log = broken / "job.log"
        metrics = broken / "run" / "metrics.jsonl"
        _wait(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 20, log)
        run("sbatch", "--partition=urgent", "--ntasks=2", "--wrap=sleep 3")
        _wait(lambda: "back into the queue" in log.read_text(), log)
        assert "asked to stop: saved step" in log.read_text()
        _wait(lambda: "JobState=COMPLETED" in run("scontrol", "show", "job", job), log)
        assert "Restarts=1" in run("scontrol", "show", "job", job)
    saved = int(re.search(r"saved step (\d+) of 600", log.read_text())[1])
    assert 20 <= saved < 600 and f"{saved} of 600 done" in log.read_text()
    assert losses(broken) == losses(straight) and lines(broken)[-1]["step"] == 600
    assert same(weights(broken), weights(straight))


def _wait(until, log: Path) -> None:
    for _ in range(3000):
        if until():
            return
        time.sleep(0.2)
    raise AssertionError(log.read_text() if log.exists() else "no output")
