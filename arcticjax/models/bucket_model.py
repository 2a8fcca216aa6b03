"""Model folders in buckets: copied into the user's cache once, then opened like any other."""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import tempfile
from pathlib import Path

from arcticjax.buckets import Bucket, Found, folder_here
from arcticjax.errors import ConfigError, ResourceError, StoreError

# What is fetched of a model that is not on this machine, but nothing in folders of other runtimes.
FETCHED = ["*.json", "*.txt", "*.safetensors", "README.md"]
NOT_FETCHED = ["onnx/*", "openvino/*"]
# One of them is in every model's folder.
_MARKS = ("config.json", "modules.json")
_log = logging.getLogger(__name__)


def holds_model(bucket: Bucket) -> bool:
    """Whether a place in a bucket is a model's folder; else it may be a run's."""
    return any(bucket.look(name) is not None for name in _MARKS)


def bring(address: str) -> Path:
    """The copy of a model's folder, made unless it is there; several processes may call it at once.

    It is keyed by the names and versions of the objects. Raises ConfigError where there is no
    model, StoreError where the store does not answer or the model changes meanwhile, and
    ResourceError where the copy cannot be written.
    """
    bucket = Bucket(address, "model")
    if not holds_model(bucket):
        bucket.list()  # raises where there is no such bucket
        export = bucket.below("export")
        advice = f"it is a run; give {export.address}" if holds_model(export) else "look at it"
        raise ConfigError(f"{bucket.address}: no folder of a model (no config.json); {advice}")
    found, facts = _listed(bucket)
    key = hashlib.sha256(facts.encode()).hexdigest()[:16]
    folder = folder_here(bucket.address) / f"model-{key}"
    if not folder.is_dir():
        size = sum(one.size for one in found) / 1e6
        _log.info("%s: copying %.1f MB into %s", bucket.address, size, folder)
        try:
            _copy(bucket, found, facts, folder)
        except StoreError:
            raise
        except FileNotFoundError:
            raise _changed(bucket) from None
        except OSError as error:
            raise ResourceError(
                f"{folder}: cannot be written ({error.strerror or error}); free disk space or set "
                "XDG_CACHE_HOME to a folder on another disk, then run the same command again"
            ) from None
    return folder


def _listed(bucket: Bucket) -> tuple[list[Found], str]:
    """The objects that are fetched, and what differs where any of them does."""
    found = [one for one in bucket.list() if _is_fetched(one.name)]
    return found, repr([(one.name, one.size, one.modified, one.version.e_tag) for one in found])


def _changed(bucket: Bucket) -> StoreError:
    return StoreError(
        f"{bucket.address}: changed while it was copied; run the same command again when it is "
        "written"
    )


def _is_fetched(name: str) -> bool:
    return any(fnmatch.fnmatch(name, one) for one in FETCHED) and not any(
        fnmatch.fnmatch(name, one) for one in NOT_FETCHED
    )


def _copy(bucket: Bucket, found: list[Found], facts: str, folder: Path) -> None:
    """Copies objects into a folder, which is there whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        made = Path(temporary) / "model"
        for one in found:
            path = made / one.name
            if not path.resolve().is_relative_to(made.resolve()):
                raise ConfigError(f"{bucket.address}: {one.name!r} is no name for a file")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for chunk in bucket.chunks(one.name, one.size):
                    file.write(chunk)
        # Pieces of an object are read one by one: files of two exports would look whole.
        if _listed(bucket)[1] != facts:
            raise _changed(bucket)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
