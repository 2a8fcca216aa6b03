"""A run keeps its identity where it is moved, and a copy gets one of its own."""

import shutil

import pytest

from arcticjax.checkpoint.identity import IDENTITY_FILE
from arcticjax.checkpoint.run_directory import RunDirectory


@pytest.fixture
def made(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    return directory, directory.identify()


def test_a_run_stays_itself_where_it_is_and_where_it_is_moved(made, tmp_path):
    directory, first = made
    assert first.copied_from is None
    assert directory.identify() == first
    shutil.move(tmp_path / "run", tmp_path / "moved")
    moved = RunDirectory(tmp_path / "moved").identify()
    assert (moved.id, moved.copied_from) == (first.id, None)
    assert moved.directory == str(tmp_path / "moved")


def test_a_copy_is_another_run_that_knows_where_it_comes_from(made, tmp_path, caplog):
    directory, first = made
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copy = RunDirectory(tmp_path / "copy").identify()
    assert copy.id != first.id and copy.copied_from == first.id
    [said] = [record.getMessage() for record in caplog.records]
    assert f"copy is a copy of {tmp_path / 'run'}, which is still there" in said
    assert RunDirectory(tmp_path / "copy").identify() == copy
    assert directory.identify() == first
    assert len(caplog.records) == 1


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"id": 3, "directory": [], "copied_from": 1}'])
def test_a_damaged_file_is_made_anew(made, text):
    directory, first = made
    (directory.path / IDENTITY_FILE).write_text(text)
    assert directory.identify().id != first.id
