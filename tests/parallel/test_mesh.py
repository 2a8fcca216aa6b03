"""The mesh and how arrays lie on it."""

import numpy as np
import pytest

from arcticjax import errors
from arcticjax.parallel import mesh as meshes


def test_auto_takes_every_device():
    assert meshes.make_mesh().devices.shape == (1, 8, 1)
    assert meshes.make_mesh("auto", 2).devices.shape == (1, 4, 2)


def test_fewer_devices_can_be_asked_for():
    assert meshes.make_mesh(2).devices.size == 2


def test_too_many_devices_are_refused():
    with pytest.raises(errors.ConfigError, match="= 12 devices, but 8 are at hand"):
        meshes.make_mesh(12)
    with pytest.raises(errors.ConfigError, match="3 does not divide the 8 devices"):
        meshes.make_mesh("auto", 3)


def test_batches_are_cut_along_both_axes_in_order():
    mesh = meshes.make_mesh(4, 2)
    part = np.arange(8)[:, None] * np.ones((1, 3))
    array = meshes.host_to_global(mesh, {"x": part})["x"]
    assert array.shape == (8, 3)
    for position, device in enumerate(mesh.devices.flat):
        (shard,) = [s for s in array.addressable_shards if s.device == device]
        assert shard.data.shape == (1, 3) and shard.data[0, 0] == position


def test_replicated_arrays_are_whole_on_every_device():
    mesh = meshes.make_mesh(8)
    array = meshes.replicate(mesh, np.arange(5))
    assert len(array.addressable_shards) == 8
    assert all(np.array_equal(shard.data, np.arange(5)) for shard in array.addressable_shards)


def test_local_positions_are_all_in_one_process():
    assert meshes.local_positions(meshes.make_mesh(8)) == list(range(8))
