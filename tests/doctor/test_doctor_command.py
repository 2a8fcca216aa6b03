"""The doctor as a user runs it: on one process and on two, on good and on bad configs."""

import json
import os
import subprocess
import sys

import jax
import pytest

from arcticjax.doctor import __main__ as command
from arcticjax.errors import ConfigError
from launch import local
from tests import tiny
from tests.train.running import ROOT

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The config of a tiny run on all of this process's devices."""
    return tiny.run_config(tmp_path_factory.mktemp("doctor"), **{"mesh.data": "auto"})


def examine(capsys, file, *sets: str) -> tuple[int, dict[str, dict]]:
    """Exit code and findings by check."""
    arguments = ["--config", str(file), "--json", str(file.with_name("findings.json"))]
    code = command.main(arguments + [word for one in sets for word in ("--set", one)])
    capsys.readouterr()
    told = json.loads(file.with_name("findings.json").read_text())
    assert told["exit_code"] == code
    return code, {one["check"]: one for one in told["findings"]}


def test_a_good_config_is_fit_to_start_and_nothing_is_left(file, capsys):
    before = sorted(file.parent.rglob("*"))
    assert command.main(["--config", str(file)]) == 0
    said = capsys.readouterr().out
    assert said.endswith("fit to start\n")
    for check in ("versions", "SIGTERM", "devices", "mesh", "all-gather", "model", "data", "tasks",
                  "memory", "storage", "disk", "disk's clock", "compiled programs"):  # fmt: skip
        assert f"\n{check} " in f"\n{said}", check
    assert "8 devices" in said
    assert sorted(file.parent.rglob("*")) == before


def test_without_a_config_the_machine_alone(capsys):
    assert command.main([]) == 0
    said = capsys.readouterr().out
    assert "all-gather" in said and "model" not in said


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        ("train.global_batch=12", "mesh", "train.global_batch"),
        ("mesh.data=16", "mesh", "but 8 are at hand"),
        ("model.init=no/such-folder/x", "model", "no such folder"),
        ("data.sources.0.path=/nowhere.parquet", "data", "no such file"),
        ("data.sources.0.query=quarry", "data", "quarry"),
        ("evaluation.tasks=[beir:/nowhere]", "tasks", "corpus.jsonl"),
        ("run.directory=ftp://bucket/run", "storage", "no address of a bucket"),
    ],
)
def test_what_is_wrong_with_a_config_is_one_row(file, capsys, change, check, message):
    code, found = examine(capsys, file, change)
    failed = [one for one in found.values() if one["status"] == "fail"]
    assert code == 2 and [one["check"] for one in failed] == [check]
    assert message in failed[0]["found"]


def test_a_run_directory_in_a_bucket(file, capsys, bucket_store):
    code, found = examine(capsys, file, f"run.directory={bucket_store.address('b/run')}")
    assert code == 0 and not bucket_store.objects
    assert "s3://b/run: an object written, read and deleted" in found["storage"]["found"]
    bucket_store.fault = lambda number, method, name: 403
    code, found = examine(capsys, file, f"run.directory={bucket_store.address('b/run')}")
    assert code == 8 and "look at the credentials" in found["storage"]["found"]


def test_a_tokenizer_that_does_not_fit_the_model(file, capsys):
    folder = tiny.tokenizer_folder(file.with_name("large"), extra=500)
    code, found = examine(capsys, file, f"model.tokenizer={folder / 'tokenizer.json'}")
    assert code == 2 and "does not match the weights" in found["model"]["found"]
    assert found["data"]["status"] == "skipped"


def test_a_disk_that_is_too_small_is_8(file, capsys, monkeypatch):
    from arcticjax.checkpoint import disk

    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    code, found = examine(capsys, file)
    assert code == 8 and found["disk"]["status"] == "fail"


def test_a_config_that_cannot_be_read_leaves_the_machine_examined(file, capsys):
    code, found = examine(capsys, file, "train.global_bach=12")
    assert code == 2 and "did you mean train.global_batch?" in found["config"]["found"]
    assert found["all-gather"]["status"] == "ok"


def test_hosts_of_a_slice_that_were_not_introduced_are_told_so(capsys, monkeypatch):
    """As on a TPU VM of several workers, where each sees the devices of all."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    assert command.main([]) == 2
    said = capsys.readouterr().out
    assert "belong to 4 processes" in said and "all-gather         skipped" in said


def test_wrong_usage_is_refused():
    with pytest.raises(ConfigError, match="--set: there is no --config"):
        command.main(["--set", "run.seed=1"])


def doctors(file, *others: str) -> tuple[int, list[dict], str]:
    """Two processes of two devices; the second with `others` after its arguments."""
    target = file.with_name("pod.json")
    target.unlink(missing_ok=True)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "arcticjax.doctor", "--config", str(file),
             "--json", str(target), *(others if rank else ())],
            env={**os.environ, **own, "PYTHONPATH": ROOT,
                 "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, own in enumerate(local.environments(2))
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    codes = {process.returncode for process in processes}
    assert len(codes) == 1, outputs
    return codes.pop(), json.loads(target.read_text())["findings"], "\n".join(outputs)


@pytest.mark.slow
def test_two_processes_are_examined_together_and_one_prints(file):
    code, found, said = doctors(file)
    assert code == 0, said
    rows = {one["check"]: one["found"] for one in found}
    assert "2 processes" in rows["devices"] and rows["all-gather"].startswith("4 devices")
    assert "seen by all processes" in rows["shared disk"]
    assert said.count("fit to start") == 1


@pytest.mark.slow
def test_processes_that_were_started_unlike_are_told_apart(file, tmp_path):
    """Another seed, and a run directory that process 0 does not see."""
    code, found, said = doctors(file, "--set", "run.seed=4", "--set", f"run.directory={tmp_path}")
    assert code == 2, said
    failed = {one["check"]: one["found"] for one in found if one["status"] == "fail"}
    assert set(failed) == {"processes", "shared disk"}, said
    assert "run.seed: 3 in process 0; 4 in process 1" in failed["processes"]
    assert failed["shared disk"].startswith("process 1 (")
