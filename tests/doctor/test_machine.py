"""What the doctor says of a machine, each in a state that is wrong."""

import importlib.metadata
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from arcticjax.doctor import machine
from arcticjax.errors import ConfigError, ResourceError


def test_versions_outside_the_requirements_are_named(monkeypatch):
    assert "jax " in str(machine.versions())
    real = importlib.metadata.version
    old = {"flax": "0.1.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: old.get(name) or real(name))
    found = machine.versions()
    assert found.status == "fail" and found.found.startswith("flax 0.1.0 (needs ")


def test_an_ignored_sigterm_is_a_failure():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert machine.stopping().status == "fail"
        signal.signal(signal.SIGTERM, lambda *_: None)
        assert machine.stopping().status == "warn"
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert machine.stopping().startswith("reaches the run")
    finally:
        signal.signal(signal.SIGTERM, before)


def test_few_open_files_are_a_warning(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    found = machine.open_files()
    assert found.status == "warn" and found.advice == "ulimit -n 4096"


def test_memory_that_does_not_suffice_is_a_matter_of_resources():
    found = machine.memory(1 << 60)
    assert found.status == "fail" and found.resource
    assert "GiB free" in machine.memory(1)


def test_storage_is_tried_where_the_directory_would_be_and_left_clean(tmp_path):
    said = machine.storage(tmp_path / "new" / "run").found
    assert f"to be made in {tmp_path}" in said and not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is not a directory"):
        machine.storage(tmp_path / "file" / "run")


def test_storage_that_cannot_be_written_is_a_matter_of_resources(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        machine.storage(tmp_path)
    assert not list(tmp_path.iterdir())


def test_storage_that_returns_other_bytes_is_refused(tmp_path, monkeypatch):
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda file: real(file)[:-1] + b"\0\0")
    with pytest.raises(ResourceError, match="other bytes"):
        machine.storage(tmp_path)


def test_room_for_the_checkpoints(tmp_path):
    assert "GiB free" in machine.room(tmp_path / "run", 1)
    with pytest.raises(ResourceError):
        machine.room(tmp_path / "run", 1 << 60)


def test_a_clock_that_differs_from_the_disk(tmp_path, monkeypatch):
    assert machine.clock(tmp_path).startswith("within")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 100)
    found = machine.clock(tmp_path / "run")
    assert found.status == "fail" and found.found == "100 s ahead of the disk's"
    assert not list(tmp_path.iterdir())
