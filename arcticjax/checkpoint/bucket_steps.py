"""The steps of a run in a bucket, whose machines share no disk.

Every process writes its part of a step below its own `directory` and uploads it; when all have, the
manifest is uploaded as the step's last object, and STEPS.json names the step. So a step is there
once its manifest is; objects without one are of an upload that broke off. As some stores list late,
nothing is believed missing because a listing lacks it: what STEPS.json names is looked for by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from arcticjax.buckets import Bucket
from arcticjax.checkpoint import orbax_io
from arcticjax.checkpoint.agreement import in_background
from arcticjax.checkpoint.leaves import Leaf
from arcticjax.checkpoint.manifest import (
    FILE_NAME,
    FileEntry,
    Manifest,
    Problem,
    TornStep,
    check_files,
    decode_manifest,
    describe_file,
    describe_files,
    encode_manifest,
    list_files,
)
from arcticjax.checkpoint.step_directories import StepDirectories
from arcticjax.errors import ResourceError, StoreError

INDEX = "STEPS.json"
# A step that is maybe good, but could not be read to the end.
UNREACHABLE = "unreachable"
_THREADS = 8
_log = logging.getLogger(__name__)


class BucketSteps(StepDirectories):
    """Steps in a bucket, and this process's copies of them below `directory`.

    copies: False for one that only looks and keeps none. before: called on process 0 before a step
    becomes one, to bring there what must not be older than it.
    """

    shared = False

    def __init__(
        self,
        directory: str | os.PathLike[str],
        bucket: Bucket,
        *,
        copies: bool = True,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(directory)
        self._bucket, self._copies, self._before = bucket, copies, before

    @property
    def place(self) -> str:
        return self._bucket.address

    def exists(self, step: int) -> bool:
        return step in self.numbers()

    def names(self) -> list[str]:
        return self._bucket.folders("")

    def numbers(self) -> list[int]:
        known = set(self._index())
        listed = {int(name) for name in self.names() if name.isascii() and name.isdigit()}
        return sorted(known | {step for step in listed - known if self._is_sealed(step)})

    def with_manifest(self) -> list[int]:
        return [step for step in self.numbers() if self._is_sealed(step)]

    def verify(
        self, step: int, *, hashes: bool = True, part: int = 0, parts: int = 1
    ) -> tuple[Problem | None, Manifest | None]:
        """Brings here what is not, and looks at all of it, as nobody else sees this copy."""
        try:
            manifest = decode_manifest(self._bucket.read(f"{step}/{FILE_NAME}"), step)
            if not self._copies:
                problem = self._compare(step, manifest)
            elif not hashes and check_files(self.path(step), manifest, hashes=False) is None:
                problem = None
            else:
                problem = self._bring(step, manifest)
        except FileNotFoundError:
            return Problem("missing-manifest", FILE_NAME, "is missing"), None
        except TornStep as torn:
            return torn.problem, None
        except OSError as error:
            return Problem(UNREACHABLE, str(step), str(error)), None
        return problem, manifest

    def commit(self, written: epath.Path, step: int, leaves: Mapping[str, Leaf]) -> None:
        """Uploads this process's files of a step and, once all have, makes it a step: on process 0,
        by its manifest. To be called by all, in any thread; all raise if it fails for one."""

        def upload() -> dict[str, tuple[int, str]]:
            files = {k: v for k, v in describe_files(written).items() if orbax_io.is_mine(k)}
            with ThreadPoolExecutor(_THREADS) as pool:
                list(
                    pool.map(
                        lambda name: self._bucket.write(f"{step}/{name}", Path(written / name)),
                        files,
                    )
                )
            return {name: (entry.size, entry.sha256) for name, entry in files.items()}

        def seal(parts: list[dict[str, tuple[int, str]]]) -> None:
            files = {name: FileEntry(*entry) for part in parts for name, entry in part.items()}
            manifest = Manifest(step, leaves, dict(sorted(files.items())))
            self._before()
            self._bucket.write(f"{step}/{FILE_NAME}", encode_manifest(manifest).encode())
            self._write_index({*self.numbers(), step})

        in_background(upload, seal)

    def clear_leftovers(self) -> None:
        """Removes what uploads that broke off and killed prunings left."""
        kept = set(map(str, self._index()))
        for name in self.names():
            if name.isdigit() and name not in kept and not self._is_sealed(int(name)):
                self._bucket.delete(found.name for found in self._bucket.list(name))

    def clear_here(self, kept: int | None) -> None:
        """Removes this process's copies but that of one step."""
        if self.directory.is_dir():
            for path in Path(self.directory).iterdir():
                if path.name != str(kept):
                    shutil.rmtree(path, ignore_errors=True)

    def unfinished(self, step: int) -> list[epath.Path]:
        start = f"{step}{orbax_io.TEMPORARY}"
        here = self.directory.iterdir() if self.directory.is_dir() else ()
        return [path for path in here if path.name.startswith(start)]

    def prune(self, newest: int, keep: int) -> None:
        try:
            good = [step for step in self.numbers() if self._manifest(step) is not None]
            for step in good[:-keep] if newest in good else []:
                self._remove(step)
        except StoreError as error:
            _log.warning("old checkpoints could not be deleted: %s", error)

    def _rename(self, step: int, suffix: str) -> str:
        taken = set(self.names())
        name, count = f"{step}.{suffix}", 2
        while name in taken:
            name, count = f"{step}.{suffix}-{count}", count + 1
        for file in [*self._files(step), FILE_NAME]:
            with contextlib.suppress(FileNotFoundError):
                self._bucket.copy(f"{step}/{file}", f"{name}/{file}")
        self._remove(step)
        return name

    def _remove(self, step: int) -> None:
        """Deletes a step; one that is killed meanwhile leaves a whole step or none."""
        files = self._files(step)
        self._write_index(set(self._index()) - {step})
        self._bucket.delete([f"{step}/{FILE_NAME}"])
        self._bucket.delete([f"{step}/{file}" for file in files])

    def _files(self, step: int) -> list[str]:
        listed = {found.name.partition("/")[2] for found in self._bucket.list(str(step))}
        manifest = self._manifest(step)
        return sorted((listed | set(manifest.files if manifest else ())) - {FILE_NAME})

    def _manifest(self, step: int) -> Manifest | None:
        try:
            return decode_manifest(self._bucket.read(f"{step}/{FILE_NAME}"), step)
        except (FileNotFoundError, TornStep):
            return None

    def _is_sealed(self, step: int) -> bool:
        return self._bucket.look(f"{step}/{FILE_NAME}") is not None

    def _index(self) -> list[int]:
        """The steps that STEPS.json names; a damaged one names none."""
        try:
            return [int(step) for step in json.loads(self._bucket.read(INDEX))["steps"]]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return []

    def _write_index(self, steps: set[int]) -> None:
        self._bucket.write(INDEX, json.dumps({"steps": sorted(steps)}).encode())

    def _compare(self, step: int, manifest: Manifest) -> Problem | None:
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(
                lambda item: self._receive(step, *item, target=None), manifest.files.items()
            )
            return next((problem for problem in found if problem is not None), None)

    def _bring(self, step: int, manifest: Manifest) -> Problem | None:
        """Makes the copy of a step equal to its manifest."""
        here = Path(self.path(step))
        for name in manifest.files:
            if not (here / name).resolve().is_relative_to(here.resolve()):
                return Problem("unreadable-manifest", FILE_NAME, f"names a file {name!r}")
        here.mkdir(parents=True, exist_ok=True)
        for name in set(list_files(epath.Path(here))) - set(manifest.files):
            (here / name).unlink()

        def bring(item: tuple[str, FileEntry]) -> Problem | None:
            name, entry = item
            target = here / name
            with contextlib.suppress(FileNotFoundError):
                if describe_file(epath.Path(target)) == entry:
                    return None
            return self._receive(step, name, entry, target)

        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(bring, manifest.files.items())
            problem = next((problem for problem in found if problem is not None), None)
        if problem is None and not orbax_io.is_merged(manifest.files):
            try:
                orbax_io.merge(epath.Path(here))
            except Exception as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                return Problem("unreadable", orbax_io.STATE, lines[0][:300])
        return problem

    def _receive(
        self, step: int, name: str, entry: FileEntry, target: Path | None
    ) -> Problem | None:
        """Reads a file of a step from the bucket into `target`, and compares it."""
        digest, size = hashlib.sha256(), 0
        try:
            found = self._bucket.look(f"{step}/{name}")
            if found is None:
                return Problem("missing-file", name, "is missing")
            if found.size != entry.size:
                detail = f"has {found.size:,} bytes instead of {entry.size:,}"
                return Problem("wrong-size", name, detail)
            part = None
            if target is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f"{target.name}.{os.getpid()}.part")
            with contextlib.ExitStack() as stack:
                file = None if part is None else stack.enter_context(part.open("wb"))
                for chunk in self._bucket.chunks(f"{step}/{name}", entry.size):
                    digest.update(chunk)
                    size += len(chunk)
                    if file is not None:
                        file.write(chunk)
        except FileNotFoundError:
            return Problem("missing-file", name, "is missing")
        if digest.hexdigest() != entry.sha256:
            detail = "has other content than was written (SHA-256 differs)"
            return Problem("wrong-hash", name, detail)
        if part is not None and target is not None:
            part.replace(target)
        return None


def open_steps(
    directory: str | os.PathLike[str],
    bucket: Bucket | None,
    before: Callable[[], None] = lambda: None,
) -> StepDirectories:
    """The steps in a bucket, of which `directory` holds copies, or those in a directory."""
    if bucket is None:
        return StepDirectories(directory)
    return BucketSteps(directory, bucket, before=before)


def require_reached(problem: Problem | None) -> None:
    """Raises ResourceError for a step that may be good, but could not be read to the end."""
    if problem is not None and problem.reason == UNREACHABLE:
        raise ResourceError(
            f"checkpoint step {problem.file} cannot be read: {problem.detail}; run the same "
            "command again"
        )
