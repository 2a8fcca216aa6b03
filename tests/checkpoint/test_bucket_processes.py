"""Checkpoints in a bucket of 2 processes with 2 devices each, whose disks nobody else sees."""

import numpy as np
import pytest

from arcticjax.buckets import Bucket
from arcticjax.checkpoint import CheckpointStore
from tests.checkpoint.processes import run_two

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error")]

PROGRAM = """
    from arcticjax.buckets import Bucket

    address, folder = arguments[0], Path(arguments[1])
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
        assert "the store is away" in raises(ResourceError, store.wait)
        Bucket.write = real
        store.save(50, make(5), {"seed": 5})
    # Machines that have nothing.
    with opened("b") as store:
        found = store.restore(target)
        assert found.step == 50 and found.meta == {"seed": 5} and same(found.state, make(5))
"""


def test_two_processes_write_and_restore_without_a_common_disk(bucket_store, tmp_path):
    address = bucket_store.address("b/run/checkpoints")
    run_two(PROGRAM, address, tmp_path)
    names = " ".join(bucket_store.below("b/run/checkpoints/50/"))
    assert "ocdbt.process_0/" in names and "ocdbt.process_1/" in names
    assert not bucket_store.below("b/run/checkpoints/40/MANIFEST.json")

    # One process, which was none of them.
    bucket = Bucket(address, "run.directory")
    params = CheckpointStore(tmp_path / "alone", bucket=bucket).restore_params()
    draw = np.random.default_rng(5).standard_normal
    assert np.array_equal(params["sharded"], draw((64, 8), np.float32))
    assert np.array_equal(params["whole"], draw((5, 3), np.float32))
