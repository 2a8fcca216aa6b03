"""Checkpoints in a bucket: believed only whole, restored on a machine that has nothing, never fewer
than one good; in a store that lists late, fails one request of three, or is away."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcticjax.buckets import Bucket
from arcticjax.checkpoint import CheckpointStore
from arcticjax.checkpoint import __main__ as command
from arcticjax.errors import CheckpointError, ConfigError, ResourceError, StoreError

ROOT = "b/run/checkpoints"
TARGET = {"params": {"w": jax.ShapeDtypeStruct((64, 3), jnp.float32)}}


@pytest.fixture
def store(bucket_store):
    return bucket_store


def make(seed):
    return {"params": {"w": jnp.asarray(np.random.default_rng(seed).random((64, 3)), jnp.float32)}}


def opened(store, folder, keep=2) -> CheckpointStore:
    """The store of a machine whose disk is `folder`."""
    return CheckpointStore(folder, keep, Bucket(store.address("b/run"), "f").below("checkpoints"))


def save(store, folder, *steps, keep=2):
    with opened(store, folder, keep) as checkpoints:
        checkpoints.restore(TARGET)
        for step in steps:
            checkpoints.save(step, make(step), {"seed": step})


def restored(store, folder):
    found = opened(store, folder).restore(TARGET)
    if found is None:
        return None
    assert np.array_equal(found.state["params"]["w"], make(found.meta["seed"])["params"]["w"])
    return found.step


def of_step(store, step):
    return store.below(f"{ROOT}/{step}/")


@pytest.mark.parametrize(
    ("scheme", "late"), [pytest.param("s3", 0, marks=pytest.mark.slow), ("s3", 3), ("gs", 0)]
)
def test_another_machine_restores_the_newest_and_old_ones_go(store, tmp_path, scheme, late):
    store.scheme, store.late = scheme, late
    assert restored(store, tmp_path / "a") is None
    save(store, tmp_path / "a", 1, 2, 3, keep=2)
    assert restored(store, tmp_path / "b") == 3
    assert not of_step(store, 1) and of_step(store, 2)
    written = [name for method, name in store.requests if method == "PUT" and f"{ROOT}/3/" in name]
    assert written[-1] == f"{ROOT}/3/MANIFEST.json"
    assert opened(store, tmp_path / "c").steps() == [2, 3]
    save(store, tmp_path / "b", 4, keep=1)
    assert opened(store, tmp_path / "c").steps() == [4]
    params = opened(store, tmp_path / "c").restore_params()
    assert np.array_equal(params["w"], make(4)["params"]["w"])


def test_an_upload_that_broke_off_is_no_step_and_is_removed(store, tmp_path):
    save(store, tmp_path / "a", 1)
    whole = {name: store.objects[name] for name in of_step(store, 1)}
    for name, content in whole.items():
        if not name.endswith("MANIFEST.json"):
            store.objects[name.replace("/1/", "/2/")] = content
    assert restored(store, tmp_path / "b") == 1
    save(store, tmp_path / "b", 3)
    assert not store.below(f"{ROOT}/2")  # nor set aside, as what was a step once
    assert opened(store, tmp_path / "c").steps() == [1, 3]


def _flip(store, name):
    store.objects[name] = bytes(255 - byte for byte in store.objects[name])


def _shorten(store, name):
    store.objects[name] = store.objects[name][:-9]


def _lose(store, name):
    del store.objects[name]


@pytest.mark.parametrize(
    ("damage", "which", "said"),
    [
        (_flip, "/d/", "SHA-256 differs"),
        (_lose, "MANIFEST.json", "is missing"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in [
                (_shorten, "/d/", "bytes instead of"),
                (_lose, "/d/", "is missing"),
                (_flip, "MANIFEST.json", "MANIFEST.json"),
                (_shorten, "MANIFEST.json", "MANIFEST.json"),
            ]
        ),
    ],
)
def test_a_damaged_step_is_passed_over_and_set_aside(store, tmp_path, caplog, damage, which, said):
    save(store, tmp_path / "a", 1, 2)
    damage(store, next(name for name in of_step(store, 2) if which in name))
    with caplog.at_level(logging.WARNING):
        assert restored(store, tmp_path / "b") == 1
    assert "step 2 in s3://b/run/checkpoints is damaged" in caplog.text and said in caplog.text
    assert not of_step(store, 2) and store.below(f"{ROOT}/2.bad-")
    with pytest.raises(CheckpointError, match="there is no checkpoint step 2"):
        opened(store, tmp_path / "b").restore(TARGET, 2)


def test_where_none_is_good_the_run_does_not_begin_again(store, tmp_path):
    save(store, tmp_path / "a", 1)
    _flip(store, next(name for name in of_step(store, 1) if "/d/" in name))
    said = r"no checkpoint in s3://b/run/checkpoints is intact.*SHA-256"
    with pytest.raises(CheckpointError, match=f"(?s){said}"):
        restored(store, tmp_path / "b")


def test_a_copy_here_that_differs_is_not_believed(store, tmp_path):
    save(store, tmp_path / "a", 1)
    for path in (tmp_path / "a" / "1").rglob("d/*"):
        path.write_bytes(bytes(path.stat().st_size))
    assert restored(store, tmp_path / "a") == 1


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_what_is_of_a_given_up_part_of_the_run_is_renamed(store, tmp_path, scheme):
    store.scheme = scheme
    save(store, tmp_path / "a", 1, 2, keep=3)
    believed = []

    def looks(number, method, name):
        if method == "PUT" and name.startswith(f"{ROOT}/2/"):
            believed.append(f"{ROOT}/2/MANIFEST.json" in store.objects)

    store.fault = looks
    with opened(store, tmp_path / "b", 3) as checkpoints:
        checkpoints.restore(TARGET, 1)
        checkpoints.save(2, make(5), {"seed": 5})
    assert restored(store, tmp_path / "c") == 2
    assert store.below(f"{ROOT}/2.superseded/")
    assert believed and not any(believed)  # were the new one to break off, the old is none


@pytest.mark.parametrize(
    "fault",
    [pytest.param(429, marks=pytest.mark.slow), pytest.param(503, marks=pytest.mark.slow), "drop"],
)
def test_a_store_that_fails_one_request_of_three(store, tmp_path, fault):
    store.fault = lambda number, method, name: None if number % 3 else fault
    save(store, tmp_path / "a", 1, 2, 3, keep=1)
    assert restored(store, tmp_path / "b") == 3
    assert opened(store, tmp_path / "c").steps() == [3]


def test_a_save_that_cannot_be_uploaded_is_an_error_and_costs_nothing_else(store, tmp_path):
    with opened(store, tmp_path / "a") as checkpoints:
        checkpoints.save(1, make(1), {"seed": 1})
        checkpoints.wait()
        store.fault = lambda number, method, name: 503 if f"{ROOT}/2/" in name else None
        checkpoints.save(2, make(2), {"seed": 2})
        said = r"checkpoint step 2 could not be written.*s3://b/run/checkpoints/2/.* 503"
        with pytest.raises(ResourceError, match=said):
            checkpoints.wait()
        assert restored(store, tmp_path / "b") == 1
        store.fault = lambda number, method, name: None
        checkpoints.save(3, make(3), {"seed": 3})
    assert restored(store, tmp_path / "b") == 3


def test_a_store_that_is_away_is_no_damage(store, tmp_path):
    save(store, tmp_path / "a", 1)
    store.fault = lambda number, method, name: 503 if "/d/" in name else None
    with pytest.raises(ResourceError, match=r"step 1 cannot be read.*503.*run the same command"):
        restored(store, tmp_path / "b")
    store.fault = lambda number, method, name: 403
    with pytest.raises(StoreError, match="look at the credentials"):
        restored(store, tmp_path / "b")
    store.fault = lambda number, method, name: None
    assert restored(store, tmp_path / "b") == 1


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_verify_looks_and_leaves_nothing(store, tmp_path, capsys, monkeypatch, scheme):
    store.scheme = scheme
    monkeypatch.chdir(tmp_path)
    save(store, tmp_path / "a", 1, 2)
    before = dict(store.objects)
    assert command.main(["verify", store.address("b/run")]) == 0
    assert command.main(["verify", store.address("b/run/checkpoints")]) == 0
    assert f"{scheme}://b/run/checkpoints: all good; the run would go on from step 2" in (
        capsys.readouterr().out
    )
    _flip(store, next(name for name in of_step(store, 2) if "/d/" in name))
    with pytest.raises(CheckpointError, match=r"damaged: step 2 .*SHA-256.*go on from step 1"):
        command.main(["verify", store.address("b/run")])
    assert store.objects.keys() == before.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(ConfigError, match="no such directory"):
        command.main(["verify", store.address("b/other")])
    store.fault = lambda number, method, name: 503 if "/d/" in name else None
    with pytest.raises(ResourceError, match="cannot be read"):
        command.main(["verify", store.address("b/run")])
