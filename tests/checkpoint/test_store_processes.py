"""The store in a run of 2 processes with 2 devices each, and its checkpoints outside that run."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from arcticjax.checkpoint import CheckpointStore

pytestmark = pytest.mark.filterwarnings("error")
ROOT = Path(__file__).resolve().parents[2]

WORKER = """
    import logging, sys, warnings
    from pathlib import Path
    warnings.simplefilter("error")
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    directory, port, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    from jax.experimental import multihost_utils
    import arcticjax.checkpoint.store as store_module
    from arcticjax.checkpoint import CheckpointStore
    from arcticjax.errors import CheckpointError, ConfigError, ResourceError
    logging.getLogger("arcticjax").addHandler(logging.FileHandler(directory / f"log-{rank}"))

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    def place(values, spec):
        shard = lambda index: values[index]
        return jax.make_array_from_callback(values.shape, NamedSharding(mesh, spec), shard)
    def make(seed):
        draw = np.random.default_rng(seed).standard_normal
        return {"params": {"sharded": place(draw((64, 8), np.float32), PartitionSpec("data")),
                           "whole": place(draw((5, 3), np.float32), PartitionSpec())},
                "step": place(np.array(seed, np.int32), PartitionSpec())}
    def same(left, right):
        for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            for a, b in zip(one.addressable_shards, other.addressable_shards, strict=True):
                assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()
        return True
    def raises(kind, action):
        try:
            action()
        except kind as error:
            return str(error)
        raise AssertionError(f"no {kind.__name__}")
    def on_primary(action):
        if rank == 0:
            action()
        multihost_utils.sync_global_devices("test")

    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(0))
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
    print("passed", rank)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """What a run of 2 processes left, after its own checks passed in both."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(folder), port]
    workers = [
        subprocess.Popen(
            [*command, str(rank)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for rank, (worker, output) in enumerate(zip(workers, outputs, strict=True)):
        assert worker.returncode == 0 and f"passed {rank}" in output, "\n".join(outputs)
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
