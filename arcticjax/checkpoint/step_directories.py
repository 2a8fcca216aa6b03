"""The directory that holds the steps of a run: their names, states of health and deletion.

`N` is a committed step, `N.bad-<reason>` a damaged one kept for inspection, `N.superseded` one that
was overtaken by a resume from an older step, `N.deleting` and `N.orbax-checkpoint-tmp` are what a
killed process left and the next save removes.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping

from etils import epath

from arcticjax.checkpoint.leaves import Leaf
from arcticjax.checkpoint.manifest import (
    FILE_NAME,
    Manifest,
    Problem,
    TornStep,
    check_files,
    read_manifest,
    write_manifest,
)
from arcticjax.checkpoint.orbax_io import TEMPORARY

_DELETING = "deleting"
_BAD = "bad-"
_log = logging.getLogger(__name__)


class StepDirectories:
    """Names below one `checkpoints/` directory, which need not exist.

    shared: whether all processes of a run write into the one directory.
    """

    shared = True

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = epath.Path(os.path.abspath(directory))

    @property
    def place(self) -> str:
        """Where the steps are, for messages."""
        return os.fspath(self.directory)

    def exists(self, step: int) -> bool:
        return self.path(step).exists()

    def path(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def names(self) -> list[str]:
        if not self.directory.is_dir():
            return []
        return sorted(path.name for path in self.directory.iterdir())

    def numbers(self) -> list[int]:
        """Steps that were committed, intact or not, ascending."""
        return sorted(int(name) for name in self.names() if name.isascii() and name.isdigit())

    def with_manifest(self) -> list[int]:
        return [step for step in self.numbers() if (self.path(step) / FILE_NAME).exists()]

    def set_aside(self) -> list[str]:
        """Names of the steps that were found damaged earlier."""
        return [name for name in self.names() if f".{_BAD}" in name]

    def verify(
        self, step: int, *, hashes: bool = True, part: int = 0, parts: int = 1
    ) -> tuple[Problem | None, Manifest | None]:
        """The first problem of a step, and its manifest if that can be read; see `check_files`."""
        try:
            manifest = read_manifest(self.path(step), step)
        except TornStep as torn:
            return torn.problem, None
        problem = check_files(self.path(step), manifest, hashes=hashes, part=part, parts=parts)
        return problem, manifest

    def commit(self, written: epath.Path, step: int, leaves: Mapping[str, Leaf]) -> None:
        """Makes a step of what is written and not yet visible; called on process 0 alone where the
        directory is shared, on all where not."""
        write_manifest(written, step, leaves)

    def clear_here(self, kept: int | None) -> None:
        """Removes copies that are of no use, where a process has copies of its own."""

    def unfinished(self, step: int) -> list[epath.Path]:
        """Where a step is or was being written."""
        start = f"{step}{TEMPORARY}"
        return [self.directory / name for name in self.names() if name.startswith(start)]

    def clear_leftovers(self) -> None:
        """Removes what killed processes left; only for the one process that writes here."""
        for name in self.names():
            if TEMPORARY in name or f".{_DELETING}" in name:
                (self.directory / name).rmtree()

    def discard_unfinished(self, step: int) -> None:
        """Removes what a failed save left."""
        for path in self.unfinished(step):
            with contextlib.suppress(OSError):
                path.rmtree()

    def mark_bad(self, step: int, problem: Problem) -> str:
        """Renames a damaged step and returns its new name."""
        return self._rename(step, _BAD + problem.reason)

    def mark_superseded(self, step: int) -> str:
        """Renames a step of an abandoned part of the run and returns its new name."""
        return self._rename(step, "superseded")

    def prune(self, newest: int, keep: int) -> None:
        """Deletes all but the newest `keep` good steps, if `newest` is among the good ones.

        Damaged steps do not count, so at least one good step always remains.
        """
        good = [step for step in self.numbers() if self.verify(step, hashes=False)[0] is None]
        if newest not in good:
            return
        for step in good[:-keep]:
            try:
                # Renamed first: a process killed here leaves no half-deleted step behind.
                (self.directory / self._rename(step, _DELETING)).rmtree()
            except OSError as error:
                _log.warning("old checkpoint step %d could not be deleted: %s", step, error)

    def _rename(self, step: int, suffix: str) -> str:
        taken = set(self.names())
        name = f"{step}.{suffix}"
        count = 2
        while name in taken:
            name = f"{step}.{suffix}-{count}"
            count += 1
        self.path(step).rename(self.directory / name)
        return name
