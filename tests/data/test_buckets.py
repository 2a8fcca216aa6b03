"""Sources in a bucket: copied once, from a store that fails, and an error where it stays away."""

import json
from pathlib import Path
from typing import Any

import pytest

from arcticjax import buckets as client
from arcticjax.config import RunConfig, SourceConfig
from arcticjax.data import adapters, buckets
from arcticjax.data.bad_records import BadRecords
from arcticjax.doctor import inputs
from arcticjax.errors import ConfigError, DataError, ResourceError

PAIRS = [(f"query {n}", f"document {n} " + "word " * n) for n in range(60)]


def jsonl(pairs) -> bytes:
    return "".join(json.dumps({"query": q, "document": d}) + "\n" for q, d in pairs).encode()


@pytest.fixture
def store(bucket_store, monkeypatch):
    monkeypatch.setattr(client, "_CHUNK", 1000)
    bucket_store.objects = {
        "data/set/a.jsonl": jsonl(PAIRS[:30]),
        "data/set/more/b.jsonl": jsonl(PAIRS[30:]),
        "data/other.jsonl": b"no",
    }
    return bucket_store


def copied(store, name, cache):
    source = SourceConfig(name="s", path=store.address(name))
    return buckets.local(source, cache)


def pairs(source):
    return list(adapters.read_pairs(source, BadRecords(source)))


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_folder_and_a_file_are_read_and_what_is_there_is_not_read_again(store, tmp_path, scheme):
    store.scheme = scheme
    folder = copied(store, "data/set", tmp_path)
    assert pairs(folder) == PAIRS
    assert pairs(copied(store, "data/set/a.jsonl", tmp_path)) == PAIRS[:30]
    del store.requests[:]
    again = copied(store, "data/set", tmp_path)
    assert again == folder and adapters.identity(again) == adapters.identity(folder)
    assert not any(name.endswith(".jsonl") and m == "GET" for m, name in store.requests)
    store.objects["data/set/a.jsonl"] += jsonl([("new", "one")])
    assert ("new", "one") in pairs(copied(store, "data/set", tmp_path))


def test_the_doctor_lists_a_bucket_and_copies_nothing(store, tmp_path):
    source = {"name": "s", "path": store.address("data/set")}
    config = RunConfig.model_validate(
        {
            "run": {"directory": str(tmp_path / "run")},
            "model": {"preset": "xs", "tokenizer": "none"},
            "data": {"sources": [source]},
            "optimizer": {"learning_rate": 1e-4},
            "train": {"global_batch": 8},
        }
    )
    tokenizer: Any = None  # of no use before the texts are there
    assert inputs.data(config, tokenizer) == "s 2 object(s) of a bucket"
    assert not list(tmp_path.iterdir())
    store.objects.clear()
    with pytest.raises(DataError, match="no such object"):
        inputs.data(config, tokenizer)


@pytest.mark.parametrize("fault", [429, 503, "drop"])
def test_a_store_that_fails_one_request_of_three_is_read_all_the_same(store, tmp_path, fault):
    store.fault = lambda number, method, name: None if number % 3 else fault
    assert pairs(copied(store, "data/set", tmp_path)) == PAIRS


def test_a_store_that_never_answers_is_an_error_that_says_so(store, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "TRIES", 2)
    store.fault = lambda number, method, name: 429 if method == "GET" and "json" in name else None
    with pytest.raises(
        DataError, match=r"^source 's', s3://data/set.*a\.jsonl.*after 1 retries.*429"
    ):
        copied(store, "data/set", tmp_path)
    assert not list((tmp_path / "buckets").iterdir())


def test_what_is_denied_is_not_asked_for_again(store, tmp_path):
    store.fault = lambda number, method, name: 403 if method == "GET" and "json" in name else None
    with pytest.raises(DataError, match=r"403 Forbidden.*look at the address, the credentials"):
        copied(store, "data/set", tmp_path)


def test_what_is_listed_late_is_noticed_while_it_is_copied(store, tmp_path):
    store.hidden = {"data/set/more/b.jsonl"}

    def appears(number, method, name):
        if name.endswith("a.jsonl"):
            store.hidden.clear()

    store.fault = appears
    with pytest.raises(DataError, match="changed while it was copied"):
        copied(store, "data/set", tmp_path)
    assert pairs(copied(store, "data/set", tmp_path)) == PAIRS


def test_nothing_there_and_names_that_lead_elsewhere(store, tmp_path):
    with pytest.raises(DataError, match="no such object, and none below it"):
        copied(store, "data/none", tmp_path)
    store.objects["data/bad/../../../x.jsonl"] = jsonl(PAIRS)
    with pytest.raises(DataError):
        copied(store, "data/bad", tmp_path)
    assert not list(tmp_path.rglob("x.jsonl"))


def test_credentials_in_an_address_are_refused_and_none_is_told(tmp_path):
    source = SourceConfig(name="s", path="s3://me:canary@bucket/a.jsonl")
    with pytest.raises(ConfigError, match="put them into the environment") as refused:
        buckets.local(source, tmp_path)
    assert "canary" not in str(refused.value)


def test_a_disk_that_cannot_be_written(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        copied(store, "data/set", Path(tmp_path / "file"))


def test_a_path_on_a_disk_stays(tmp_path):
    source = SourceConfig(name="s", path=str(tmp_path / "a.jsonl"))
    assert buckets.local(source, tmp_path) is source
