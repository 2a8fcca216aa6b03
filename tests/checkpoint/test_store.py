"""Saving and restoring: bit-exact, on other device counts, with pruning and resumes."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from arcticjax.checkpoint import CheckpointStore
from arcticjax.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.filterwarnings("error")


def mesh_of(count):
    kind = jax.sharding.AxisType.Auto
    return jax.make_mesh((count,), ("data",), axis_types=(kind,), devices=jax.devices()[:count])


def make_state(seed=0, devices=8, width=16):
    """Every kind of leaf: sharded, replicated, scalar, bfloat16, NaN payloads, integers."""
    generator = np.random.default_rng(seed)
    sharded = NamedSharding(mesh_of(devices), PartitionSpec("data"))
    replicated = NamedSharding(mesh_of(devices), PartitionSpec())
    bits = generator.integers(0, 2**32, (24,), dtype=np.uint32)
    bits[:2] = 0x7FC12345, 0xFFC00001  # NaNs whose payload must survive

    def normal(*shape):
        return generator.standard_normal(shape, dtype=np.float32)

    return {
        "params": {
            "embeddings": {"token": jax.device_put(normal(64, width), sharded)},
            "layers": {"scale": jax.device_put(normal(3, 8).astype(jnp.bfloat16), replicated)},
        },
        "optimizer": {
            "bits": jax.device_put(bits.view(np.float32), replicated),
            "count": jax.device_put(np.int32(7), replicated),
        },
    }


def abstract(state, sharding=None):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding or leaf.sharding
        ),
        state,
    )


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_restored_state_and_meta_equal_the_saved_bit_for_bit(tmp_path):
    state = make_state()
    meta = {"fingerprint": "ä", "config": {"loss": 0.02, "list": [1, None, True]}}
    with CheckpointStore(tmp_path / "checkpoints") as store:
        store.save(40, state, meta)
    with CheckpointStore(tmp_path / "checkpoints") as store:
        restored = store.restore(abstract(state))
        assert store.steps() == [40]
    assert restored.step == 40 and restored.meta == meta
    assert_same_bits(restored.state, state)
    for one, other in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state), strict=True):
        assert one.sharding == other.sharding


def test_an_optimizer_state_of_named_tuples_keeps_its_form(tmp_path):
    params = {"kernel": jax.device_put(np.ones((8, 4), np.float32), jax.devices()[0])}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = {"params": params, "optimizer": optimizer.init(params)}
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, {})
        restored = store.restore(abstract(state))
    assert_same_bits(restored.state, state)


@pytest.mark.parametrize("count", [4, 1])
def test_a_state_of_eight_devices_is_restored_on_fewer_without_a_changed_bit(tmp_path, count):
    state = make_state(devices=8)
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, {})
        sharded = NamedSharding(mesh_of(count), PartitionSpec())
        target = abstract(state, sharded)
        token = target["params"]["embeddings"]["token"]
        target["params"]["embeddings"]["token"] = jax.ShapeDtypeStruct(
            token.shape, token.dtype, sharding=NamedSharding(mesh_of(count), PartitionSpec("data"))
        )
        restored = store.restore(target).state
    assert_same_bits(restored, state)
    assert len(restored["params"]["embeddings"]["token"].sharding.device_set) == count


def test_params_are_read_without_a_target_as_numpy(tmp_path):
    state = make_state()
    with CheckpointStore(tmp_path) as store:
        store.save(3, state, {"contract": "x"})
        store.wait()
        params = CheckpointStore(tmp_path).restore_params()
        assert store.read_meta() == {"contract": "x"}
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
    assert_same_bits(params, state["params"])


def test_a_save_is_a_snapshot_although_the_arrays_are_donated_at_once(tmp_path):
    sharding = NamedSharding(mesh_of(8), PartitionSpec("data"))
    values = np.random.default_rng(0).standard_normal((1 << 20, 8), dtype=np.float32)
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    state = {"params": {"kernel": jax.device_put(values, sharding)}}
    target = abstract(state)
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, {})
        for _ in range(5):
            state = bump(state)
        jax.block_until_ready(state)
        restored = store.restore(target)
    assert np.asarray(restored.state["params"]["kernel"]).tobytes() == values.tobytes()


def test_an_empty_directory_restores_to_none_and_reading_creates_nothing(tmp_path):
    store = CheckpointStore(tmp_path / "none")
    assert store.restore(abstract(make_state())) is None
    assert store.newest() is None and store.steps() == []
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        store.restore_params()
    assert not (tmp_path / "none").exists()


def test_only_the_newest_steps_are_kept(tmp_path):
    state = make_state()
    with CheckpointStore(tmp_path, keep=2) as store:
        for step in (10, 20, 30, 100):
            store.save(step, state, {})
        store.wait()
        assert store.steps() == [30, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100", "30"]


def test_damaged_steps_do_not_count_as_kept(tmp_path):
    state = make_state()
    with CheckpointStore(tmp_path, keep=1) as store:
        store.save(10, state, {})
        store.wait()
        store.save(20, state, {})
        # The newest is damaged the moment it is committed: the older one must survive.
        seal = store._write_manifest

        def seal_then_damage():
            seal()
            next(iter(tmp_path.glob("30.orbax*/state/ocdbt.process_0/d/*"))).write_bytes(b"")

        store.wait()
        store._write_manifest = seal_then_damage
        store._writer = None
        store.save(30, state, {})
        store.wait()
        assert store.steps() == [20, 30]
        assert store.restore(abstract(state)).step == 20


def test_a_damaged_step_takes_no_good_one_s_place(tmp_path):
    state = make_state()
    with CheckpointStore(tmp_path, keep=2) as store:
        store.save(10, state, {})
        store.save(20, state, {})
        store.wait()
        (tmp_path / "20" / "meta" / "metadata").write_bytes(b"")
        store.save(30, state, {})
        store.wait()
        assert store.steps() == [10, 20, 30]


def test_keep_below_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint\.keep is 0"):
        CheckpointStore(tmp_path, keep=0)


def test_a_finished_run_reopened_leaves_its_last_step_alone(tmp_path):
    state = make_state()
    with CheckpointStore(tmp_path) as store:
        store.save(50, state, {})
    before = (tmp_path / "50" / "MANIFEST.json").stat().st_mtime_ns
    with CheckpointStore(tmp_path) as store:
        restored = store.restore(abstract(state))
        store.save(50, restored.state, restored.meta)
    assert (tmp_path / "50" / "MANIFEST.json").stat().st_mtime_ns == before


def test_a_run_that_did_not_resume_cannot_write_over_the_steps_of_another(tmp_path):
    state = make_state()
    with CheckpointStore(tmp_path) as store:
        store.save(50, state, {})
    for step in (40, 50):
        with CheckpointStore(tmp_path) as store, pytest.raises(CheckpointError, match="step 50"):
            store.save(step, state, {})
    assert CheckpointStore(tmp_path).steps() == [50]


def test_going_on_from_an_older_step_sets_the_later_ones_aside(tmp_path, caplog):
    first, second = make_state(1), make_state(2)
    with CheckpointStore(tmp_path, keep=3) as store:
        for step in (10, 20, 30):
            store.save(step, first, {})
    with CheckpointStore(tmp_path, keep=3) as store:
        assert store.restore(abstract(first), step=10).step == 10
        with caplog.at_level(logging.WARNING, "arcticjax"):
            store.save(20, second, {})
        store.wait()
        assert store.steps() == [10, 20]
        assert_same_bits(store.restore(abstract(first)).state, second)
    assert (tmp_path / "20.superseded").is_dir() and (tmp_path / "30.superseded").is_dir()
    assert "20.superseded" in caplog.text


def test_a_step_that_is_not_there_is_named_with_those_that_are(tmp_path):
    state = make_state()
    with CheckpointStore(tmp_path) as store:
        store.save(10, state, {})
        store.wait()
        with pytest.raises(CheckpointError, match=r"no checkpoint step 11 .* there are: 10"):
            store.restore(abstract(state), step=11)
        with pytest.raises(CheckpointError, match="there are: 10"):
            store.restore_params(11)


def test_leaves_that_cannot_be_stored_are_refused(tmp_path):
    store = CheckpointStore(tmp_path)
    for leaf in (np.ones(3), 1.0, jax.random.key(0)):
        with pytest.raises(TypeError, match="params/x"):
            store.save(1, {"params": {"x": leaf}}, {})
    with pytest.raises(TypeError):
        store.save(1, make_state(), {"path": Path()})
    assert list(tmp_path.iterdir()) == []
