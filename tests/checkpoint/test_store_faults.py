"""What a damaged, foreign, interrupted or full checkpoint directory does to a run."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import arcticjax.checkpoint.disk
import arcticjax.checkpoint.store
from arcticjax.checkpoint import CheckpointStore, step_directories
from arcticjax.errors import CheckpointError, ResourceError

pytestmark = pytest.mark.filterwarnings("error")
ROOT = Path(__file__).resolve().parents[2]


def make_state(seed, width=8):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    values = np.random.default_rng(seed).standard_normal((64, width), dtype=np.float32)
    token = jax.device_put(values, NamedSharding(mesh, PartitionSpec("data")))
    count = jax.device_put(np.int32(seed), NamedSharding(mesh, PartitionSpec()))
    return {"params": {"token": token}, "count": count}


def abstract(state):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


TARGET = abstract(make_state(0))


def value(restored):
    return np.asarray(restored.state["params"]["token"]).tobytes()


def expected(seed):
    return np.asarray(make_state(seed)["params"]["token"]).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 80 and 120 with states 1 and 2."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with CheckpointStore(directory) as store:
        store.save(80, make_state(1), {"name": "old"})
        store.save(120, make_state(2), {"name": "new"})
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def files_of(step):
    return sorted(path for path in step.rglob("*") if path.is_file())


def largest(step):
    """The file that holds most of the arrays."""
    return max(files_of(step / "state"), key=lambda path: path.stat().st_size)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def garble(path):
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))


def delete(path):
    path.unlink()


DAMAGES = {
    truncate: "wrong-size",
    flip: "wrong-hash",
    empty: "wrong-size",
    garble: "wrong-hash",
    delete: "missing-file",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_data_file_makes_the_older_step_be_used_and_says_so(copy, caplog, damage):
    path = largest(copy / "120")
    name = str(path.relative_to(copy / "120"))
    damage(path)
    store = CheckpointStore(copy)
    with caplog.at_level(logging.WARNING, "arcticjax"):
        restored = store.restore(TARGET)
    assert (restored.step, restored.meta) == (80, {"name": "old"})
    assert value(restored) == expected(1)
    assert store.steps() == [80]
    bad = f"120.bad-{DAMAGES[damage]}"
    assert (copy / bad).is_dir() and not (copy / "120").exists()
    for part in ("step 120", name, "using step 80", bad):
        assert part in caplog.text


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_to_any_file_is_noticed_or_harmless(saved, tmp_path, damage):
    for number, path in enumerate(files_of(saved / "120")):
        copy = Path(shutil.copytree(saved, tmp_path / str(number)))
        name = path.relative_to(saved / "120")
        damage(copy / "120" / name)
        store = CheckpointStore(copy)
        if str(name) in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            restored = store.restore(TARGET)
            assert restored.step == 120 and value(restored) == expected(2), name
        else:
            assert store.newest() == 80, name
            assert (copy / "120").exists(), "reading must rename nothing"


def test_a_missing_manifest_is_not_trusted(copy, caplog):
    (copy / "120" / "MANIFEST.json").unlink()
    assert CheckpointStore(copy).steps() == [80]
    with caplog.at_level(logging.WARNING, "arcticjax"):
        assert CheckpointStore(copy).restore(TARGET).step == 80
    assert "MANIFEST.json" in caplog.text and (copy / "120.bad-missing-manifest").is_dir()


def test_a_manifest_that_was_edited_or_moved_is_not_trusted(copy):
    path = copy / "120" / "MANIFEST.json"
    good = path.read_text()
    path.write_text(good.replace('"float32"', '"float16"', 1))
    assert CheckpointStore(copy).newest() == 80
    path.write_text(good)
    assert CheckpointStore(copy).newest() == 120
    (copy / "120").rename(copy / "200")
    assert CheckpointStore(copy).newest() == 80


def test_arrays_that_verify_but_cannot_be_read_fall_back_too(copy, monkeypatch, caplog):
    read = arcticjax.checkpoint.store.read_arrays

    def broken(step, wanted, *, as_numpy):
        if step.name == "120":
            raise ValueError("INVALID_ARGUMENT: not a zarr array")
        return read(step, wanted, as_numpy=as_numpy)

    monkeypatch.setattr(arcticjax.checkpoint.store, "read_arrays", broken)
    assert value(CheckpointStore(copy).restore(TARGET)) == expected(1)
    assert "not a zarr array" in caplog.text


def test_no_good_step_is_an_error_and_never_a_silent_start(copy):
    for step in ("80", "120"):
        flip(largest(copy / step))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="does not silently start") as caught:
            CheckpointStore(copy).restore(TARGET)
        assert "step 80" in str(caught.value) and "step 120" in str(caught.value)
    assert (copy / "80").is_dir() and (copy / "120").is_dir()
    with pytest.raises(CheckpointError, match="does not silently start"):
        CheckpointStore(copy).restore_params()


def test_steps_found_damaged_before_still_forbid_a_silent_start(copy):
    flip(largest(copy / "120"))
    CheckpointStore(copy).restore(TARGET)
    shutil.rmtree(copy / "80")
    with pytest.raises(CheckpointError, match=r"120\.bad-wrong-hash"):
        CheckpointStore(copy).restore(TARGET)


def test_a_damaged_step_asked_for_by_number_is_an_error(copy):
    flip(largest(copy / "120"))
    store = CheckpointStore(copy)
    for read in (lambda: store.restore(TARGET, step=120), lambda: store.restore_params(120)):
        with pytest.raises(CheckpointError, match=r"step 120 .* damaged .*SHA-256"):
            read()
    assert (copy / "120").is_dir()


def test_another_model_gets_a_table_of_the_leaves_that_differ(copy):
    wanted = {**abstract(make_state(0, width=12)), "extra": TARGET["count"]}
    wanted["params"]["bias"] = wanted["params"].pop("token")
    with pytest.raises(CheckpointError) as caught:
        CheckpointStore(copy).restore(wanted)
    lines = [line.split() for line in str(caught.value).splitlines()]
    assert ["params/bias", "-", "float32[64,12]"] in lines
    assert ["params/token", "float32[64,8]", "-"] in lines
    assert ["extra", "-", "int32[]"] in lines
    assert "3 of 4 leaves differ" in str(caught.value)
    assert (copy / "120").is_dir(), "a foreign step is not a damaged one"


def test_another_shape_or_dtype_is_refused_not_cast(copy):
    for wanted in (
        jax.ShapeDtypeStruct((64, 8), np.float16),
        jax.ShapeDtypeStruct((64, 9), np.float32),
    ):
        target = {**TARGET, "params": {"token": wanted}}
        with pytest.raises(CheckpointError, match="1 of 2 leaves differ"):
            CheckpointStore(copy).restore(target)


CHILD = """
    import os, signal, sys, threading
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax.numpy as jnp
    import arcticjax.checkpoint.step_directories as steps_module
    from arcticjax.checkpoint import CheckpointStore

    directory, moment = sys.argv[1:]
    kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    store = CheckpointStore(directory)
    state = {"params": {"token": jnp.ones((2048, 2048))}}
    store.save(10, state, {})
    store.wait()
    if moment == "sealing":
        steps_module.write_manifest = kill
    store.save(20, state, {})
    if moment == "writing":
        kill()
    store.wait()
"""


@pytest.mark.parametrize("moment", ["writing", "sealing"])
def test_a_save_killed_midway_is_ignored_and_later_removed(tmp_path, moment):
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path), moment]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert any(path.name.startswith("20.orbax") for path in tmp_path.iterdir())
    target = {"params": {"token": jax.ShapeDtypeStruct((2048, 2048), np.float32)}}
    with CheckpointStore(tmp_path) as store:
        assert store.steps() == [10]
        restored = store.restore(target)
        assert restored.step == 10
        store.save(20, restored.state, {})
        store.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20"]


def test_a_first_save_killed_midway_leaves_nothing_to_restore(copy):
    shutil.rmtree(copy / "80")
    (copy / "120").rename(copy / "120.orbax-checkpoint-tmp")
    assert CheckpointStore(copy).restore(TARGET) is None


def test_a_deletion_killed_midway_leaves_no_torn_step(copy, caplog):
    (copy / "80").rename(copy / "80.deleting")
    delete(largest(copy / "80.deleting"))
    with CheckpointStore(copy) as store:
        restored = store.restore(TARGET)
        assert restored.step == 120 and caplog.text == ""
        store.save(130, restored.state, {})
    assert sorted(path.name for path in copy.iterdir()) == ["120", "130"]


def test_too_little_room_is_said_before_anything_is_written(copy, monkeypatch):
    monkeypatch.setattr(arcticjax.checkpoint.disk, "free_bytes", lambda _: 1234)
    state = make_state(3)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    store = CheckpointStore(copy)
    store.restore(TARGET)
    (copy / "125.orbax-checkpoint-tmp").mkdir()  # of a save that was killed: it makes room
    for ask in (lambda: store.require_room(TARGET), lambda: store.save(130, state, {})):
        with pytest.raises(ResourceError, match=r"[\d,]+ bytes needed, 1,234 bytes free") as caught:
            ask()
        said = int(str(caught.value).split(" bytes needed")[0].split()[-1].replace(",", ""))
        assert needed <= said < needed + 100_000
        assert sorted(path.name for path in copy.iterdir()) == ["120", "80"]
    assert CheckpointStore(copy).newest() == 120


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "bytes needed"),
        (ValueError('RESOURCE_EXHAUSTED: Error writing "params.token/0"'), "bytes needed"),
        (OSError(5, "Input/output error"), "could not be written .* Input/output error"),
    ],
)
def test_a_write_that_fails_in_the_background_is_one_clear_error(copy, monkeypatch, error, message):
    def fail(*_):
        raise error

    store = CheckpointStore(copy)
    store.restore(TARGET)
    with monkeypatch.context() as patch:
        patch.setattr(step_directories, "write_manifest", fail)
        store.save(130, make_state(3), {})
        with pytest.raises(ResourceError, match=f"checkpoint step 130 .*{message}"):
            store.wait()
    assert sorted(path.name for path in copy.iterdir()) == ["120", "80"]
    # The run may go on: the next save, and the end of the program, are clean.
    store.save(140, make_state(4), {})
    store.close()
    assert value(CheckpointStore(copy).restore(TARGET)) == expected(4)


def test_a_failed_save_does_not_hide_the_error_of_the_run(copy, monkeypatch, caplog):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step_directories, "write_manifest", fail)
    with pytest.raises(KeyError, match="the run"), CheckpointStore(copy) as store:
        store.restore(TARGET)
        store.save(130, make_state(3), {})
        raise KeyError("the run")
    assert "the last checkpoint was not saved" in caplog.text


FULL_CHILD = """
    import os, sys
    os.environ["JAX_PLATFORMS"] = "cpu"
    import numpy as np, jax.numpy as jnp
    import arcticjax.checkpoint.disk as disk
    from arcticjax.checkpoint import CheckpointStore
    from arcticjax.errors import run_cli

    def main():
        values = lambda seed: jnp.asarray(np.random.default_rng(seed).standard_normal((1024, 1024)))
        store = CheckpointStore(sys.argv[1], keep=5)
        store.save(10, {"params": {"token": values(0)}}, {})
        store.wait()
        real, disk.free_bytes = disk.free_bytes, lambda _: None  # another writer is faster
        store.save(20, {"params": {str(i): values(i) for i in range(4)}}, {})
        disk.free_bytes = real
        store.wait()

    run_cli(main)
"""


def test_a_full_disk_is_one_line_not_hundreds(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(tmp_path)])
    if mounted.returncode:
        pytest.skip("this machine does not let root mount a small disk")
    try:
        command = [sys.executable, "-c", textwrap.dedent(FULL_CHILD), str(tmp_path / "run")]
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert child.returncode == 8, child.stderr
        lines = [line for line in child.stderr.splitlines() if line.strip()]
        assert len(lines) <= 3 and "Traceback" not in child.stderr, child.stderr
        assert "bytes needed" in lines[-1] and "bytes free" in lines[-1]
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["10"]
        assert CheckpointStore(tmp_path / "run").newest() == 10
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_the_manifest_lists_every_leaf_and_file(saved):
    manifest = json.loads((saved / "120" / "MANIFEST.json").read_text())
    assert manifest["leaves"] == {
        "count": {"shape": [], "dtype": "int32"},
        "params/token": {"shape": [64, 8], "dtype": "float32"},
    }
    listed = set(manifest["files"])
    found = {str(path.relative_to(saved / "120")) for path in files_of(saved / "120")}
    assert found - listed == {"MANIFEST.json", "_CHECKPOINT_METADATA", "commit_success.txt"}


def test_nothing_of_the_library_s_log_reaches_the_user(tmp_path, caplog, capfd):
    with caplog.at_level(logging.INFO), CheckpointStore(tmp_path) as store:
        store.save(1, make_state(1), {})
        store.wait()
        store.restore(TARGET)
        store.restore_params()
    logging.getLogger("absl").warning("of somebody else")
    assert [record.getMessage() for record in caplog.records] == ["of somebody else"]
    assert not [line for line in capfd.readouterr().err.splitlines() if "of somebody" not in line]
