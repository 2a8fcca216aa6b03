"""A run kept in a bucket: as on a disk, resumed by machines that have nothing of it."""

import json
import random
import re
import signal
import time

import pytest

from arcticjax import errors
from arcticjax.buckets import Bucket
from arcticjax.checkpoint import CheckpointStore
from arcticjax.checkpoint import mirror as mirrors
from arcticjax.checkpoint.mirror import Mirror
from arcticjax.checkpoint.store import CheckpointStore as Store
from launch.local import environments
from tests import tiny
from tests.train import running
from tests.train.running import BARE, fails, finish, same, start, train

pytestmark = pytest.mark.usefixtures("quick_compiler")
STEPS = 50
LONG = {
    "train.total_steps": STEPS, "checkpoint.save_every_steps": 5, "evaluation.tasks": [], **BARE
}  # fmt: skip
SHORT = {"evaluation.tasks": [], "report.tensorboard": False, **BARE}


@pytest.fixture
def store(bucket_store):
    return bucket_store


def in_bucket(store, folder, **changes):
    return tiny.run_config(folder, **{"run.directory": store.address("b/run"), **changes})


def losses(store):
    lines = map(json.loads, store.objects["b/run/metrics.jsonl"].decode().splitlines())
    return [(line["step"], line["source"], line["loss"]) for line in lines]


def weights(store, folder):
    """What a machine that has nothing reads."""
    bucket = Bucket(store.address("b/run"), "run.directory").below("checkpoints")
    return CheckpointStore(folder / "copies", bucket=bucket).restore_params()


@pytest.mark.slow
def test_a_run_that_fails_is_resumed_elsewhere_bit_for_bit(store, tmp_path, monkeypatch, capsys):
    """In a store that lists late and fails one request of five."""
    train(tiny.run_config(tmp_path / "straight", **SHORT))
    store.late, store.fault = 2, lambda number, method, name: None if number % 5 else 503
    file = in_bucket(store, tmp_path / "config", **SHORT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    real = Store.save

    def fails_later(self, step, *rest):
        if step > 3:
            raise errors.ResourceError("lightning struck")
        real(self, step, *rest)

    monkeypatch.setattr(Store, "save", fails_later)
    fails(file, errors.ResourceError, "lightning")
    assert store.objects["b/run/run.lock"] == b""
    assert "b/run/result.json" not in store.objects
    monkeypatch.setattr(Store, "save", real)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    train(file)
    assert "steps    3 of 8 done" in capsys.readouterr().err
    assert losses(store) == running.losses(tmp_path / "straight")
    assert same(weights(store, tmp_path), running.weights(tmp_path / "straight"))
    assert json.loads(store.objects["b/run/result.json"])["steps"] == 8
    assert len(json.loads(store.objects["b/run/goodput.json"])["attempts"]) == 2
    names = {"config.yaml", "run.json", "train.log", "tokenizer/tokenizer.json"}
    assert not {f"b/run/{name}" for name in names} - set(store.objects)
    assert not [name for name in store.objects if "/cache/" in name or "/." in name]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "three"))
    before = dict(store.objects)
    train(file)
    assert "s3://b/run: finished at step 8; nothing to do" in capsys.readouterr().out
    assert {**store.objects, "b/run/run.lock": b""} == before
    fails(file, errors.ConfigError, "s3://b/run holds a run with another config", "run.seed=4")


def test_what_cannot_be_written_is_refused_before_anything_compiles(store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    file = in_bucket(store, tmp_path / "config", **SHORT)
    store.fault = lambda number, method, name: 403
    fails(file, errors.ResourceError, "s3://b/run/.*403.*look at the credentials")
    store.fault = lambda number, method, name: None
    store.buckets = {"other"}
    fails(file, errors.ResourceError, "s3://b/run: there is no such bucket")


def test_a_run_that_lost_its_lease_uploads_nothing_more(store, tmp_path, mirrored):
    def taken_over():
        raise errors.ConfigError("taken over")

    mirrored._check = taken_over
    with pytest.raises(errors.ConfigError, match="taken over"), mirrored:
        (tmp_path / "train.log").write_text("a\n")
        until(lambda: not mirrored._thread.is_alive())
    assert not store.objects


@pytest.fixture
def mirrored(store, tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "SECONDS", 0.01)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "report").mkdir()
    bucket = Bucket(store.address("b/run"), "run.directory")
    return Mirror(tmp_path, bucket, lambda: None, ["checkpoints"], last="result.json")


def until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_small_files_follow_and_the_result_is_last(store, tmp_path, mirrored):
    with mirrored:
        (tmp_path / "train.log").write_text("a\n")
        until(lambda: store.objects.get("b/run/train.log") == b"a\n")
        (tmp_path / "train.log").write_text("a\nb\n")
        until(lambda: store.objects.get("b/run/train.log") == b"a\nb\n")
        (tmp_path / "checkpoints" / "x").write_text("")
        (tmp_path / ".hidden").write_text("")
        mirrored._lock.acquire()
        for name in ("report/z.svg", "result.json", "metrics.jsonl"):
            (tmp_path / name).write_text(name)
        mirrored._lock.release()
    put = [name for method, name in store.requests if method == "PUT"]
    assert put[-1] == "b/run/result.json" and put.count("b/run/result.json") == 1
    names = ["metrics.jsonl", "report/z.svg", "result.json", "train.log"]
    assert sorted(store.objects) == [f"b/run/{name}" for name in names]


def test_a_store_that_is_away_is_told_of_once_and_asked_again(store, tmp_path, mirrored, caplog):
    store.fault = lambda number, method, name: 503
    with mirrored:
        (tmp_path / "train.log").write_text("a\n")
        until(lambda: len(store.requests) > 30)
        store.fault = lambda number, method, name: None
        until(lambda: "again" in caplog.text.splitlines()[-1:][0] and store.objects)
    assert caplog.text.count("training goes on") == 1
    assert caplog.text.count("has the files of the run again") == 1


def test_what_is_not_uploaded_at_the_end_is_an_error(store, tmp_path, mirrored):
    store.fault = lambda number, method, name: 503
    with pytest.raises(errors.ResourceError, match=r"train\.log.*503"), mirrored:
        (tmp_path / "train.log").write_text("a\n")


def machine(folder, name, **more) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(folder / name), "JAX_ENABLE_COMPILATION_CACHE": "1", **more}


def begun_at(output: str) -> int:
    return int(re.search(rf"steps +(\d+) of {STEPS} done", output)[1])


def newest(store) -> int:
    """The newest step that STEPS.json names; 0 if there is none. Of one whose manifest alone is
    there, a listing that is late need not know yet."""
    index = store.objects.get("b/run/checkpoints/STEPS.json", b'{"steps": []}')
    return max(json.loads(index)["steps"], default=0)


def wait_for_checkpoint(store, step, processes):
    def there():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        return newest(store) >= step

    until(there)


def finish_all(processes, code: int = 0) -> list[str]:
    """What each said; all of it if one ends otherwise, as the first to fail ends the others."""
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert {process.returncode for process in processes} == {code}, "\n".join(outputs)
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_killed_and_stopped_runs_go_on_elsewhere_bit_for_bit(store, tmp_path, scheme):
    """SIGKILL, then SIGTERM, each time on another machine, in a store that fails now and then."""
    store.scheme = scheme
    finish(start(tiny.run_config(tmp_path / "straight", **LONG)))
    store.late, store.fault = 2, lambda number, method, name: None if number % 20 else 429
    file = in_bucket(store, tmp_path / "config", **LONG)
    process = start(file, environment=machine(tmp_path, "one"))
    wait_for_checkpoint(store, 10, [process])
    time.sleep(random.uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    store.times["b/run/run.lock"] -= 500  # no need to wait for the lease to be stale

    process = start(file, environment=machine(tmp_path, "two"))
    output = ""
    while "compiles" not in output:
        output += process.stdout.readline()
    begun = begun_at(output)
    assert begun >= 10
    wait_for_checkpoint(store, begun + 10, [process])
    process.send_signal(signal.SIGTERM)
    output = finish(process, 42)
    saved = int(re.search(rf"saved step (\d+) of {STEPS} in {scheme}://b/run", output)[1])
    assert store.objects["b/run/run.lock"] == b""
    assert f"saved step {saved}" not in store.objects["b/run/train.log"].decode()
    assert losses(store)[-1][0] == saved

    output = finish(start(file, environment=machine(tmp_path, "three")))
    assert begun_at(output) == saved
    assert losses(store) == running.losses(tmp_path / "straight")
    assert same(weights(store, tmp_path), running.weights(tmp_path / "straight"))
    assert len(json.loads(store.objects["b/run/goodput.json"])["attempts"]) == 3


@pytest.mark.slow
def test_two_processes_that_share_no_disk(store, tmp_path):
    """Killed, resumed by two other machines, stopped, resumed by one process alone; with state that
    is spread over the processes."""
    two = LONG | {"mesh.data": 2, "mesh.peer_seconds": 10}
    for process in [
        start(tiny.run_config(tmp_path / "straight", **two), environment=one)
        for one in environments(2)
    ]:
        finish(process)
    file = in_bucket(store, tmp_path / "config", **two)

    def both(*names):
        return [
            start(file, environment=machine(tmp_path, name, **one))
            for name, one in zip(names, environments(2), strict=True)
        ]

    processes = both("a", "b")
    wait_for_checkpoint(store, 10, processes)
    processes[1].send_signal(signal.SIGKILL)
    finish(processes[1], -signal.SIGKILL)
    finish(processes[0], 141)
    store.times["b/run/run.lock"] -= 500

    processes = both("c", "d")
    wait_for_checkpoint(store, newest(store) + 10, processes)
    processes[1].send_signal(signal.SIGTERM)
    outputs = finish_all(processes, 42)
    assert begun_at(outputs[0]) >= 10
    saved = {re.search(rf"saved step (\d+) of {STEPS}", output)[1] for output in outputs}
    assert len(saved) == 1

    outputs = finish_all(both("e", "f"))
    assert begun_at(outputs[0]) == int(saved.pop())
    assert losses(store) == running.losses(tmp_path / "straight")
    assert same(weights(store, tmp_path), running.weights(tmp_path / "straight"))
    parts = [
        name for name in store.below(f"b/run/checkpoints/{STEPS}/") if "ocdbt.process_" in name
    ]
    assert {re.search(r"process_(\d)", name)[1] for name in parts} == {"0", "1"}
