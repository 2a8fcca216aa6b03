"""The mesh and how arrays lie on it."""

import dataclasses
from dataclasses import dataclass

import jax
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


def test_slices_share_the_devices_in_order():
    mesh = meshes.make_mesh(4, 2, slices=2)
    assert mesh.shape == {"slice": 2, "data": 2, "fsdp": 2}
    assert [device.id for device in mesh.devices.flat] == list(range(8))


@dataclass(frozen=True)
class Device:
    """What a mesh is chosen by."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "GPU"


def make(monkeypatch, devices, *arguments, **options) -> list[list[int]]:
    """The ids of each slice, of a mesh of `devices`."""
    processes = len({device.process_index for device in devices})
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "device_count", lambda: len(devices))
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(meshes, "Mesh", lambda grid, axes, axis_types: grid)
    grid = meshes.make_mesh(*arguments, **options)
    return [[device.id for device in part.flat] for part in grid]


# As a real machine may list them: the slices' devices mixed.
REPORTED = [Device(n, n // 2, (n // 2) % 2) for n in range(8)]
PROCESSES = [Device(n, n // 2, 0) for n in range(8)]


def test_slices_are_those_that_the_devices_report(monkeypatch):
    wanted = [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert make(monkeypatch, REPORTED) == make(monkeypatch, REPORTED, slices=2) == wanted
    with pytest.raises(errors.ConfigError, match=r"slices: 4, but the devices report 2 slice\(s\)"):
        make(monkeypatch, REPORTED, slices=4)
    with pytest.raises(errors.ConfigError, match=r"slices: 1, but the devices report 2 slice\(s\)"):
        make(monkeypatch, REPORTED, slices=1)


def test_a_slice_that_tpus_do_not_report_is_refused(monkeypatch):
    devices = [dataclasses.replace(one, platform="tpu") for one in PROCESSES]
    with pytest.raises(errors.ConfigError, match=r"slices: 2, but the devices report 1 slice\(s\)"):
        make(monkeypatch, devices, slices=2)


def test_neighbouring_processes_make_a_slice_where_none_is_reported(monkeypatch):
    assert make(monkeypatch, PROCESSES, slices=2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert make(monkeypatch, PROCESSES, slices=4) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert make(monkeypatch, PROCESSES, "auto", 2, slices=2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(errors.ConfigError, match="4 processes do not make 8 equal slices"):
        make(monkeypatch, PROCESSES, slices=8)


def test_slices_that_do_not_divide_the_devices_are_refused():
    with pytest.raises(errors.ConfigError, match=r"3 slices cannot share the 8 devices"):
        meshes.make_mesh(slices=3)
    with pytest.raises(errors.ConfigError, match=r"4 slices cannot share the 2 devices"):
        meshes.make_mesh(2, 4, slices=4)


@pytest.mark.parametrize("slices", [1, 2, 8])
def test_gathered_documents_stand_in_the_order_of_the_batch(slices):
    mesh = meshes.make_mesh(slices=slices)

    def gathered(part):
        return meshes.gather(part[0])[None]

    whole = jax.shard_map(gathered, mesh=mesh, in_specs=meshes.BATCH, out_specs=meshes.BATCH)
    part = np.arange(16.0).reshape(8, 2)
    found = jax.jit(whole)(meshes.host_to_global(mesh, part))
    np.testing.assert_array_equal(found, np.broadcast_to(np.arange(16.0), (8, 16)))


@pytest.mark.parametrize("slices", [1, 2])
def test_batches_are_cut_along_all_axes_in_order(slices):
    mesh = meshes.make_mesh(4, 2, slices=slices)
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


@pytest.mark.parametrize(
    ("backend", "devices", "waits"), [("cpu", 8, True), ("cpu", 1, False), ("gpu", 8, False)]
)
def test_programs_run_one_at_a_time_where_devices_share_the_threads_of_a_cpu(
    monkeypatch, backend, devices, waits
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    assert meshes.one_at_a_time() is waits
