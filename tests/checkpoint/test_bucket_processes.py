"""Checkpoints in a bucket of 2 processes with 2 devices each, whose disks nobody else sees."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from arcticjax.buckets import Bucket
from arcticjax.checkpoint import CheckpointStore

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error")]
ROOT = Path(__file__).resolve().parents[2]

WORKER = """
    import sys, warnings
    from pathlib import Path
    warnings.simplefilter("error")
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    address, folder, port, rank = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    from jax.experimental import multihost_utils
    from arcticjax.buckets import Bucket
    from arcticjax.checkpoint import CheckpointStore, orbax_io
    from arcticjax.errors import ResourceError

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
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(0))
    bucket = Bucket(address, "run.directory")
    def opened(machine):
        return CheckpointStore(folder / f"{machine}-{rank}", 2, bucket)

    with opened("a") as store:
        assert store.restore(target) is None
        store.require_room(target)
        for seed in (1, 2, 3):
            store.save(seed * 10, make(seed), {"seed": seed})
        store.wait()
        multihost_utils.sync_global_devices("pruned")
        assert store.steps() == [20, 30], store.steps()
        # Back to it, as after numbers that are not finite.
        found = store.restore(target)
        assert found.step == 30 and same(found.state, make(3)), found
        # What one cannot upload fails for both.
        real = Bucket.write
        def fails(self, name, content):
            if rank == 1 and "/ocdbt.process_1/" in name:
                raise ResourceError("the store is away")
            real(self, name, content)
        Bucket.write = fails
        store.save(40, make(4), {"seed": 4})
        try:
            store.wait()
        except ResourceError as error:
            assert "the store is away" in str(error), error
        else:
            raise AssertionError("saved")
        Bucket.write = real
        store.save(50, make(5), {"seed": 5})
    # Machines that have nothing.
    with opened("b") as store:
        found = store.restore(target)
        assert found.step == 50 and found.meta == {"seed": 5} and same(found.state, make(5))
    print("passed", rank)
"""


def test_two_processes_write_and_restore_without_a_common_disk(bucket_store, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    address = bucket_store.address("b/run/checkpoints")
    command = [sys.executable, "-c", textwrap.dedent(WORKER), address, str(tmp_path), port]
    workers = [
        subprocess.Popen(
            [*command, str(rank)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    for rank, worker in enumerate(workers):
        output, _ = worker.communicate(timeout=240)
        assert worker.returncode == 0 and f"passed {rank}" in output, output
    names = " ".join(bucket_store.below("b/run/checkpoints/50/"))
    assert "ocdbt.process_0/" in names and "ocdbt.process_1/" in names
    assert not bucket_store.below("b/run/checkpoints/40/MANIFEST.json")

    # One process, which was none of them.
    bucket = Bucket(address, "run.directory")
    params = CheckpointStore(tmp_path / "alone", bucket=bucket).restore_params()
    draw = np.random.default_rng(5).standard_normal
    assert np.array_equal(params["sharded"], draw((64, 8), np.float32))
    assert np.array_equal(params["whole"], draw((5, 3), np.float32))
