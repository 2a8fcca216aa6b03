"""Looks at every checkpoint of a run: which are good, and what is wrong with the others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from etils import epath

from arcticjax.buckets import Bucket, is_address
from arcticjax.checkpoint.bucket_steps import BucketSteps, require_reached
from arcticjax.checkpoint.manifest import Manifest, Problem
from arcticjax.checkpoint.step_directories import StepDirectories
from arcticjax.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Verdict:
    """What is the matter with one step: `problem` None for a good one, whose manifest is given."""

    step: int
    problem: Problem | None
    manifest: Manifest | None

    def __str__(self) -> str:
        if self.problem is not None or self.manifest is None:
            return f"step {self.step}  damaged  {self.problem}"
        sizes = [file.size for file in self.manifest.files.values()]
        return f"step {self.step}  good     {len(sizes)} files, {sum(sizes):,} bytes"


def find(run: str | os.PathLike[str]) -> StepDirectories:
    """The checkpoints of a run directory, or of a directory of checkpoints itself.

    They may be in a bucket. Raises ConfigError where there is no such directory.
    """
    if is_address(run):
        return _find_in_bucket(os.fspath(run))
    path = epath.Path(os.path.abspath(os.path.expanduser(run)))
    if not path.is_dir():
        raise ConfigError(f"{path}: no such directory; give the run.directory of a run")
    return StepDirectories(path / "checkpoints" if (path / "checkpoints").is_dir() else path)


def _find_in_bucket(address: str) -> StepDirectories:
    place = Bucket(address, "RUN")
    if not place.address.endswith("/checkpoints"):
        place = place.below("checkpoints")
    found = BucketSteps("unused", place, copies=False)
    if not found.numbers() and not place.list():
        raise ConfigError(f"{place.address}: no such directory; give the run.directory of a run")
    return found


def verify(directories: StepDirectories) -> Iterator[Verdict]:
    """Compares every file of every step with its manifest, the oldest step first; changes nothing.

    Steps that a live run deletes meanwhile are left out.
    """
    for step in directories.numbers():
        problem, manifest = directories.verify(step)
        require_reached(problem)
        if problem is None or directories.exists(step):
            yield Verdict(step, problem, manifest)


def require_good(directories: StepDirectories, verdicts: list[Verdict]) -> int:
    """The newest good step; raises CheckpointError where a step is damaged or none is good."""
    place = directories.place
    good = [verdict.step for verdict in verdicts if verdict.problem is None]
    bad = [verdict for verdict in verdicts if verdict.problem is not None]
    if not good:
        found = "none of them is good" if bad or directories.set_aside() else "there is none"
        raise CheckpointError(
            f"checkpoints in {place}: {found}. Restore one from a copy, or start anew with another "
            "run.directory"
        )
    if bad:
        damaged = ", ".join(f"step {one.step} ({one.problem})" for one in bad)
        raise CheckpointError(
            f"checkpoints in {place}: damaged: {damaged}. The run would go on from step "
            f"{good[-1]}; restore the damaged files from a copy to keep more"
        )
    return good[-1]
