"""The paths of a run and the faults of the place it is put."""

import errno
import os
import subprocess

import pytest

import arcticjax.checkpoint.run_directory as module
from arcticjax.checkpoint import RunDirectory
from arcticjax.errors import ConfigError, ResourceError

pytestmark = pytest.mark.filterwarnings("error")


def test_create_makes_the_layout_once_and_keeps_what_is_there(tmp_path):
    directory = RunDirectory(tmp_path / "a" / "run")
    assert not directory.path.exists()
    directory.create()
    directory.metrics_file.write_text("{}\n")
    directory.create()
    assert directory.metrics_file.read_text() == "{}\n"
    assert sorted(os.listdir(directory.path)) == ["checkpoints", "metrics.jsonl", "report"]
    assert os.listdir(directory.checkpoints) == []


def test_the_config_is_written_whole_and_read_back(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.create()
    assert directory.read_config() is None
    directory.write_config("seed: 1\n")
    directory.write_config("seed: 2  # ä\n")
    assert directory.read_config() == "seed: 2  # ä\n"
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "config.yaml", "metrics.jsonl", "report"]


def test_a_config_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    directory.create()
    directory.write_config("seed: 1\n")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(ResourceError, match=r"run\.directory .* disk is full"):
        directory.write_config("seed: 2\n")
    assert directory.read_config() == "seed: 1\n"


def test_home_and_relative_paths_are_made_absolute(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert RunDirectory("~/run").path == RunDirectory("run").path == tmp_path / "run"


@pytest.mark.parametrize("inside", ["", "deeper/run"])
def test_a_file_in_the_way_is_named(tmp_path, inside):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"run\.directory .*: .*/file is not a directory"):
        RunDirectory(tmp_path / "file" / inside).claim()
    assert (tmp_path / "file").read_text() == "x"


def test_a_file_in_place_of_the_checkpoints_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("x")
    with pytest.raises(ConfigError, match="checkpoints is not a directory"):
        RunDirectory(tmp_path).create()


def test_a_dangling_link_is_named(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="link is not a directory"):
        RunDirectory(tmp_path / "link").create()


@pytest.mark.parametrize("name", ["", "  ", "x" * 300, "nul\0byte"])
def test_names_that_cannot_be_paths_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"run\.directory"):
        RunDirectory(f"{tmp_path}/{name}" if name.strip() else name).create()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EIO])
def test_a_place_that_cannot_be_written_is_a_resource_error(tmp_path, monkeypatch, code):
    def refuse(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(module, "_write_through", refuse)
    with pytest.raises(ResourceError, match=rf"run\.directory .*{os.strerror(code)}"):
        RunDirectory(tmp_path).create()


def test_a_read_only_disk_is_a_resource_error(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]).returncode:
        pytest.skip("this machine does not let root mount")
    try:
        with pytest.raises(ResourceError, match="Read-only file system"):
            RunDirectory(tmp_path / "run").create()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_too_little_room_names_needed_and_free_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SMALL_FILES", 1 << 60)
    with pytest.raises(ResourceError, match=r"run\.directory.* [\d,]+ bytes needed, [\d,]+ bytes"):
        RunDirectory(tmp_path).create()


def test_the_folder_of_a_run_in_a_bucket_begins_as_the_bucket_is(
    bucket_store, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bucket_store.objects = {"b/run/config.yaml": b"seed: 1\n", "b/run/other": b""}
    directory = RunDirectory(bucket_store.address("b/run"))
    assert directory.path.is_relative_to(tmp_path) and directory.place == "s3://b/run"
    directory.create()
    directory.config_file.write_text("of an earlier attempt")
    (directory.path / "result.json").write_text("of a run that is not there any more")
    (directory.path / "export").mkdir()
    (directory.checkpoints / "3").mkdir()
    directory.bring(["config.yaml", "result.json"])
    assert directory.read_config() == "seed: 1\n"
    assert sorted(os.listdir(directory.path)) == ["checkpoints", "config.yaml", "report"]
    assert os.listdir(directory.checkpoints) == ["3"]
