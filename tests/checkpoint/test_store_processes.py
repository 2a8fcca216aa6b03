"""The store in a run of 2 processes with 2 devices each, and its checkpoints outside that run."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from arcticjax.checkpoint import CheckpointStore
from tests.checkpoint.processes import run_two

pytestmark = pytest.mark.filterwarnings("error")

PROGRAM = """
    import logging
    import arcticjax.checkpoint.store as store_module

    directory = Path(arguments[0])
    logging.getLogger("arcticjax").addHandler(logging.FileHandler(directory / f"log-{rank}"))
    def on_primary(action):
        if rank == 0:
            action()
        multihost_utils.sync_global_devices("test")

    path = directory / "checkpoints"
    store = CheckpointStore(path, keep=2)
    assert store.restore(target) is None
    for seed in (1, 2, 3):
        store.save(seed * 10, make(seed), {"seed": seed})
    store.wait()
    multihost_utils.sync_global_devices("pruned")
    assert store.steps() == [20, 30], store.steps()
    restored = store.restore(target)
    assert restored.step == 30 and restored.meta == {"seed": 3} and same(restored.state, make(3))

    # A refusal on process 0 is raised by both, and a process-local array by name.
    real = store_module.require_free
    def full(*_):
        raise ResourceError("the disk is full")
    store_module.require_free = full if rank == 0 else real
    assert raises(ResourceError, lambda: store.save(40, make(4), {})) == "the disk is full"
    store_module.require_free = real
    local = {"params": {"x": jax.device_put(np.ones(3), jax.local_devices()[0])}}
    assert "params/x" in raises(TypeError, lambda: store.save(40, local, {}))

    # One damaged file, seen by the process whose share it is: both fall back.
    files = sorted((path / "30").glob("state/ocdbt.process_*/d/*"), key=lambda p: p.stat().st_size)
    for file in files[-2:]:
        on_primary(lambda: file.write_bytes(bytes(255 - byte for byte in file.read_bytes())))
    restored = CheckpointStore(path).restore(target)
    multihost_utils.sync_global_devices("restored")
    assert restored.step == 20 and same(restored.state, make(2))
    assert (path / "30.bad-wrong-hash").is_dir()
    longer = jax.ShapeDtypeStruct((2,), np.int32, sharding=target["step"].sharding)
    wrong = {**target, "step": longer}
    assert "int32[2]" in raises(CheckpointError, lambda: CheckpointStore(path).restore(wrong))

    # Storage that is not shared is the configuration's fault and damages nothing.
    elsewhere = path if rank == 0 else directory / "elsewhere"
    assert "process 1" in raises(ConfigError, lambda: CheckpointStore(elsewhere).restore(target))
    assert CheckpointStore(path).newest() == 20
    # One process may read by itself.
    if rank == 1:
        assert CheckpointStore(path).restore_params()["sharded"].shape == (64, 8)
    store.close()
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """What a run of 2 processes left, after its own checks passed in both."""
    folder = tmp_path_factory.mktemp("processes")
    run_two(PROGRAM, folder)
    return folder


def test_two_processes_save_fall_back_and_restore_alike(directory):
    assert "30.bad-wrong-hash" in (directory / "log-0").read_text()
    assert (directory / "log-1").read_text() == "", "only process 0 talks"


def test_a_checkpoint_of_two_processes_is_restored_in_one(directory):
    draw = np.random.default_rng(2).standard_normal
    expected = {"sharded": draw((64, 8), np.float32), "whole": draw((5, 3), np.float32)}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def target(shape, dtype, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    restored = CheckpointStore(directory / "checkpoints").restore(
        {
            "params": {
                "sharded": target((64, 8), np.float32, "data"),
                "whole": target((5, 3), np.float32),
            },
            "step": target((), np.int32),
        }
    )
    assert restored.step == 20 and int(restored.state["step"]) == 2
    for name, values in expected.items():
        assert np.asarray(restored.state["params"][name]).tobytes() == values.tobytes()
