"""One writer for a run directory in a bucket, by conditional writes."""

import json
import logging
import threading
import time
from dataclasses import asdict, replace

import pytest

from arcticjax.buckets import Bucket
from arcticjax.checkpoint import RunDirectory, lease, lock
from arcticjax.checkpoint.lock_object import LockObject
from arcticjax.errors import ConfigError, StoreError

LOCK = "b/run/run.lock"


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def store(bucket_store):
    return bucket_store


def directory(store) -> RunDirectory:
    return RunDirectory(store.address("b/run"))


def owned_by_another(store, **changes) -> None:
    other = replace(lease._myself(), host="elsewhere", machine="another", token="other", **changes)
    store.write(LOCK, lock.encode(other))


def beats(store, **changes):
    """Another machine's run that shows signs of life, until the event is set."""
    stop = threading.Event()

    def beat():
        while not stop.wait(0.02):
            owned_by_another(store, **changes)
            store.times[LOCK] = time.time() + beat.count
            beat.count += 1

    beat.count = 0
    owned_by_another(store)
    thread = threading.Thread(target=beat)
    thread.start()
    return stop, thread


def test_a_second_run_is_refused_with_the_first_ones_host_and_process(store):
    with directory(store).claim(heartbeat_seconds=0.01) as held:
        with pytest.raises(ConfigError, match=rf"s3://b/run is in use by process {held.owner.pid}"):
            directory(store).claim()
        time.sleep(0.1)  # heartbeats
        assert not held.lost
        assert json.loads(store.objects[LOCK]) == asdict(held.owner)
    assert store.objects[LOCK] == b""
    directory(store).claim().release()


def test_a_run_on_another_machine_that_lives_is_waited_for_and_not_disturbed(store):
    stop, thread = beats(store)
    try:
        with pytest.raises(ConfigError, match=r"in use by process \d+ on host elsewhere"):
            directory(store).claim(stale_seconds=20)
    finally:
        stop.set()
        thread.join()
    assert json.loads(store.objects[LOCK])["host"] == "elsewhere"


def test_a_stale_lease_is_taken_over(store, caplog):
    owned_by_another(store)
    store.times[LOCK] = time.time() - 500
    with caplog.at_level(logging.WARNING), directory(store).claim() as held:
        assert json.loads(store.objects[LOCK])["token"] == held.owner.token
    assert "taking over run.directory s3://b/run from process" in caplog.text
    assert not [name for name in store.objects if "run.lock-" in name]


def test_of_many_claims_at_once_one_wins(store):
    store.write(LOCK, b"")
    won, refused = [], []
    bucket = Bucket(store.address("b/run"), "run.directory")

    def claim():
        try:
            won.append(lease.claim(LockObject(bucket, "run.lock")))
        except ConfigError as error:
            refused.append(error)

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(refused) == 7
    won[0].release()


def test_a_lease_that_was_taken_over_stops_the_run_and_is_left_alone(store):
    with directory(store).claim(heartbeat_seconds=0.01) as held:
        owned_by_another(store)
        while not held.lost:
            time.sleep(0.01)
        with pytest.raises(ConfigError, match="s3://b/run was taken over by another run"):
            held.check()
    assert json.loads(store.objects[LOCK])["host"] == "elsewhere"


def test_a_store_that_is_away_for_a_while_costs_no_lease(store):
    with directory(store).claim(heartbeat_seconds=0.01) as held:
        store.fault = lambda number, method, name: 503
        asked = len(store.requests)
        while len(store.requests) < asked + 40:
            time.sleep(0.01)
        store.fault = lambda number, method, name: None
        time.sleep(0.05)
        assert not held.lost


def test_a_write_whose_answer_was_lost_is_not_another_run(store):
    """The store has done what it was asked, but the connection drops before it says so."""

    def loses_the_answer(number, method, name):
        if method == "PUT" and name == LOCK and not store.objects.get(LOCK):
            store.fault = lambda number, method, name: None
            store.write(LOCK, sent[0])
            return "drop"
        return None

    sent = []
    real = lock.encode

    def encode(owner):
        sent.append(real(owner))
        return sent[-1]

    store.fault = loses_the_answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arcticjax.checkpoint.lock_object.encode", encode)
        held = directory(store).claim()
    held.release()


def test_what_cannot_be_written_is_refused_in_the_stores_words(store, tmp_path):
    store.fault = lambda number, method, name: 403 if method == "PUT" else None
    with pytest.raises(StoreError, match=r"s3://b/run/.*403.*look at the credentials"):
        directory(store).claim()
    store.fault = lambda number, method, name: 403 if method in ("DELETE", "POST") else None
    with pytest.raises(StoreError, match=r"s3://b/run.*403"):
        directory(store).claim()
    store.fault = lambda number, method, name: None
    store.buckets = {"other"}
    with pytest.raises(StoreError, match="s3://b/run: there is no such bucket; make it"):
        directory(store).claim()
    with pytest.raises(ConfigError, match="holds credentials"):
        RunDirectory("s3://me:secret@b/run")
    with pytest.raises(ConfigError, match="no address of a bucket"):
        RunDirectory("ftp://b/run")


def test_google_s_stores(store):
    store.scheme = "gs"
    with directory(store).claim(heartbeat_seconds=0.01) as held:
        with pytest.raises(ConfigError, match="gs://b/run is in use"):
            directory(store).claim()
        time.sleep(0.1)
        assert not held.lost
    assert store.objects[LOCK] == b""
    with pytest.raises(ConfigError, match=r"may be endpoint_override, scheme for gs://"):
        RunDirectory("gs://b/run?region=here")
