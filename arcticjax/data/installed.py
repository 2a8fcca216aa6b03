"""Which Python source files are installed, by package; nothing is imported to find out."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

STANDARD_LIBRARY = "stdlib"

# Tests say what they check, not what a thing is; bundled copies of other packages are duplicates.
_SKIPPED_FOLDERS = frozenset(
    "test tests testdata _vendor vendor vendored third_party extern externals _external "
    "__pycache__ site-packages dist-packages idlelib lib2to3 ensurepip turtledemo".split()
)


def installed_distributions() -> list[str]:
    """Names and versions of all installed distributions, as their metadata folders spell them.

    Takes a millisecond: only names of folders on the path are read.
    """
    distributions = set()
    for entry in sys.path:
        try:
            names = os.listdir(entry or ".")
        except OSError:
            continue
        distributions.update(name for name in names if name.endswith((".dist-info", ".egg-info")))
    return sorted(distributions)


def package_files() -> dict[str, list[Path]]:
    """Python files by top-level import name, for all installed distributions, and `stdlib`.

    From the distributions' own lists of files, so a namespace package holds the files of all its
    distributions. A project installed in editable mode lists none, and is not found.
    """
    files: dict[str, dict[str, Path]] = {}
    for distribution in importlib.metadata.distributions():
        record = distribution.read_text("RECORD")
        if record is not None:
            listed = [row[0] for row in csv.reader(record.splitlines()) if row]
        else:
            listed = [str(path) for path in distribution.files or ()]
        for name in listed:
            path = name.replace("\\", "/")
            if path.endswith(".py") and not path.startswith(("..", "/")) and _is_wanted(path):
                package = path.split("/", 1)[0].removesuffix(".py")
                # The first on the path is the one that an import finds.
                located = Path(str(distribution.locate_file(path)))
                files.setdefault(package, {}).setdefault(path, located)
    files.pop("arcticjax", None)  # there or not by the way it is installed; the pairs must not tell
    root = Path(sysconfig.get_path("stdlib"))
    files[STANDARD_LIBRARY] = {path.as_posix(): path for path in _walk(root)}
    return {package: list(paths.values()) for package, paths in files.items()}


def _walk(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _SKIPPED_FOLDERS]
        for name in files:
            path = Path(folder, name)
            if name.endswith(".py") and _is_wanted(path.relative_to(root).as_posix()):
                yield path


def _is_wanted(path: str) -> bool:
    *folders, name = path.split("/")
    stem = name.removesuffix(".py")
    is_test = stem.startswith("test_") or stem.endswith(("_test", "_pb2")) or stem == "conftest"
    return not is_test and _SKIPPED_FOLDERS.isdisjoint(folders)
