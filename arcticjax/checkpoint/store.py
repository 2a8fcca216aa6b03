"""Saves, verifies, restores, and falls back to the newest good checkpoint.

A step is the directory `<checkpoints>/<step>`: `state/` (the arrays), `meta/` (JSON) and our
MANIFEST.json. It is written under a temporary name and renamed when every process is done; the
manifest is written just before that rename, so a step that can be seen is complete unless something
damaged it later.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arcticjax.buckets import Bucket
from arcticjax.checkpoint.agreement import everywhere, from_primary, gather_texts
from arcticjax.checkpoint.bucket_steps import open_steps, require_reached
from arcticjax.checkpoint.disk import explain_write_failure, require_free
from arcticjax.checkpoint.leaves import Leaf, describe_leaves, difference_table, name_leaves, nest
from arcticjax.checkpoint.manifest import Manifest, Problem, sync_to_disk
from arcticjax.checkpoint.orbax_io import META, META_FILE, STATE, AsyncWriter, read_arrays
from arcticjax.checkpoint.quiet import quiet
from arcticjax.errors import ArcticError, CheckpointError, ConfigError

_RELISTS = 5
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """A verified step: its number, the state in the form of the target tree, and its JSON meta."""

    step: int
    state: Any
    meta: dict[str, Any]


@dataclass(frozen=True)
class _Pending:
    """A save that runs in the background; `size` in bytes."""

    step: int
    size: int
    leaves: Mapping[str, Leaf]
    silence: contextlib.ExitStack


class CheckpointStore:
    """The checkpoints of one run.

    In a run of several processes every process makes a store on the same (shared) directory, or
    one of its own with the same bucket, and calls `require_room`, `save`, `wait`, `restore` and
    `close` together. `steps`, `newest`, `restore_params` and `read_meta` are local to the caller
    and change nothing, so they are safe beside a live run.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int = 2,
        bucket: Bucket | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """`keep` (at least 1) is the number of newest good steps that survive a save. bucket: where
        the steps are, if not in `directory`, which then holds this process's copies; before: called
        on process 0, in a thread, before a step is one there."""
        if keep < 1:
            raise ConfigError(f"checkpoint.keep is {keep}: at least 1 checkpoint must be kept")
        self._disk = open_steps(directory, bucket, before)
        self.directory = self._disk.directory
        self.keep = keep
        self._writer: AsyncWriter | None = None
        self._pending: _Pending | None = None
        # Steps that this store saved or restored: the line that the run is on.
        self._own: set[int] = set()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            # The error under way says more than what it left behind.
            _log.warning("the last checkpoint was not saved: %s", failure)

    def require_room(self, state: Any) -> None:
        """Raises ResourceError where no save of `state` (or its shapes) would fit on the disk."""

        def check() -> None:
            self._disk.clear_leftovers()  # as a save does first
            require_free(self.directory, needed, "a checkpoint")

        needed = _stored_bytes(name_leaves(state))
        from_primary(check)
        self._make_way_here(needed)

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts saving and returns once the arrays may be donated; see `wait`.

        `state` is a nested dict (or other pytree) of global jax arrays, `meta` is JSON-able. First
        waits for the save before. A step that this store saved or restored is left as it is.
        Raises ResourceError when the disk is full, for this save or the one before (older steps
        stay as they are), and CheckpointError over steps that belong to another run.
        """
        named = name_leaves(state)
        _require_global_arrays(named)
        text = json.dumps(dict(meta))
        self.wait()
        size = _stored_bytes(named) + len(text)
        if not from_primary(lambda: self._make_way(step, size)):
            return
        self._make_way_here(size)
        silence = contextlib.ExitStack()
        silence.enter_context(quiet())
        self._pending = _Pending(step, size, describe_leaves(named), silence)
        try:
            if self._writer is None:
                self._writer = AsyncWriter(self._write_manifest, alone=not self._disk.shared)
            self._writer.start(self._disk.path(step), named, meta)
        except Exception as error:
            explained = self._abandon(error)
            raise explained from explained.__cause__

    def wait(self) -> None:
        """Blocks until the save under way is verified and committed, then deletes the oldest steps.

        Raises ResourceError when it could not be written; nothing is left of it then.
        """
        if self._pending is None or self._writer is None:
            return
        try:
            self._writer.wait()
        except Exception as error:
            explained = self._abandon(error)
            raise explained from explained.__cause__
        pending, self._pending = self._pending, None
        pending.silence.close()
        newest = pending.step
        self._own.add(newest)
        if jax.process_index() == 0:
            sync_to_disk(self.directory)
            self._disk.prune(newest, self.keep)
        self._disk.clear_here(newest)

    def close(self) -> None:
        """Waits for the save under way and releases the background threads."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def steps(self) -> list[int]:
        """Committed steps, ascending; whether each is intact is known only after `restore`."""
        return self._disk.with_manifest()

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
        """Restores the newest good step (or exactly `step`) into the form of `abstract_state`.

        `abstract_state`: a tree of ShapeDtypeStruct, each with the sharding that the array shall
        have (on any number of devices; without one: the first device). The arrays are bit-equal to
        the saved ones. A damaged step is skipped with a warning and renamed once an older one has
        been restored. None when nothing was ever committed. Raises CheckpointError when steps exist
        but none is good, or when the leaves differ from the wanted ones in name, shape or dtype.
        """
        self.wait()
        wanted = {name: _with_sharding(leaf) for name, leaf in name_leaves(abstract_state).items()}
        bad: list[tuple[int, Problem]] = []
        for candidate in self._candidates(step):
            problem, manifest = self._verify_together(candidate)
            arrays: Mapping[str, Any] = {}
            if problem is None and manifest is not None:
                self._require_fit(candidate, manifest.leaves, describe_leaves(wanted))
                problem, arrays = self._read_together(candidate, wanted)
            if problem is not None:
                if step is not None:
                    raise CheckpointError(self._damaged_message(step, problem))
                bad.append((candidate, problem))
                continue
            meta = self.read_meta(candidate)
            from_primary(lambda good=candidate: self._set_aside(bad, good))
            self._own = {candidate}
            structure = jax.tree_util.tree_structure(abstract_state)
            state = jax.tree_util.tree_unflatten(structure, list(arrays.values()))
            return Restored(candidate, state, meta)
        self._require_none_lost(bad)
        return None

    def newest(self) -> int | None:
        """The newest step whose every file verifies, or None when nothing was ever committed.

        Raises CheckpointError when steps exist but none is good. Renames nothing: another process
        may be training into this directory.
        """
        bad: list[tuple[int, Problem]] = []
        for _attempt in range(_RELISTS):
            bad, vanished = [], False
            for candidate in reversed(self._disk.numbers()):
                problem = self._disk.verify(candidate)[0]
                if problem is None:
                    for torn, reason in bad:
                        _log.warning("%s", self._skip_message(torn, reason, candidate))
                    return candidate
                require_reached(problem)
                if self._disk.exists(candidate):
                    bad.append((candidate, problem))
                else:
                    vanished = True  # a live run deletes old steps while others read
            if not vanished:
                break
        self._require_none_lost(bad)
        return None

    def restore_params(self, step: int | None = None) -> dict[str, Any]:
        """The model parameters (`params` in the state) as nested dict of NumPy arrays.

        Needs no target tree and no device. `step` None is the newest good one. Raises
        CheckpointError when there is none, or when the given one is missing or damaged.
        """
        step, manifest = self._good(step)
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype))
            for name, leaf in manifest.leaves.items()
            if name.startswith("params/")
        }
        if not wanted:
            raise CheckpointError(
                f"checkpoint step {step} in {self._disk.place} holds no model parameters; its "
                f"leaves are {', '.join(list(manifest.leaves)[:5])} ..."
            )
        try:
            arrays = read_arrays(self._disk.path(step), wanted, as_numpy=True)
        except Exception as error:
            raise CheckpointError(
                f"checkpoint step {step} in {self._disk.place} cannot be read: {_first_line(error)}"
            ) from error
        return nest(arrays)["params"]

    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        """The JSON meta saved with a step (None: the newest good one); see `restore_params`."""
        step, _ = self._good(step, hashes=False)
        return json.loads((self._disk.path(step) / META / META_FILE).read_text())

    def _make_way(self, step: int, size: int) -> bool:
        """Prepares the directory for a save; False when the step is already there. Primary only."""
        numbers = self._disk.numbers()
        if step in self._own and step in numbers:
            return False
        later = [number for number in numbers if number >= step and number not in self._own]
        if later and not self._own:
            raise CheckpointError(
                f"{self._disk.place} already holds checkpoint step {later[-1]}, and this run did "
                f"not resume from it, so step {step} is not saved beside it: resume, or use "
                "another run.directory"
            )
        with explain_write_failure(self.directory, f"checkpoint step {step}", size):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._disk.clear_leftovers()
            for number in later:
                _log.warning(
                    "checkpoint step %d is of a part of this run that was given up when it resumed "
                    "from an older step; it is kept as %s",
                    number,
                    self._disk.mark_superseded(number),
                )
            require_free(self.directory, size, f"checkpoint step {step}")
        return True

    def _make_way_here(self, size: int) -> None:
        """Prepares the directories of the processes for a save, where each has its own."""

        def make_way() -> None:
            with explain_write_failure(self.directory, "a checkpoint", size):
                self.directory.mkdir(parents=True, exist_ok=True)
            self._disk.clear_here(max(self._own, default=None))
            require_free(self.directory, size, "a checkpoint")

        if not self._disk.shared:
            everywhere(make_way)

    def _write_manifest(self) -> None:
        """Makes a step of what is written and not yet visible: on process 0, once the files of all
        are there; on every process where they share no disk."""
        pending = self._pending
        if pending is None:
            raise RuntimeError("a checkpoint was finished that nobody started")
        place = self._disk.unfinished(pending.step)[0]
        self._disk.commit(place, pending.step, pending.leaves)

    def _abandon(self, error: Exception) -> ArcticError:
        """Removes what a failed save left, and says in one line what happened."""
        # Its threads and signals belong to the failed save; the next save gets a fresh one. The
        # silence stays: writes still under way go on failing, and logging it, after this.
        pending, self._pending, self._writer = self._pending, None, None
        if pending is None:
            raise RuntimeError("no save is under way")
        if jax.process_index() == 0 or not self._disk.shared:
            self._disk.discard_unfinished(pending.step)
        try:
            what = f"checkpoint step {pending.step}"
            with explain_write_failure(self.directory, what, pending.size):
                raise error
        except ArcticError as explained:
            return explained

    def _candidates(self, step: int | None) -> list[int]:
        numbers = from_primary(lambda: list(reversed(self._disk.numbers())))
        if step is None:
            return numbers
        if step not in numbers:
            raise CheckpointError(self._missing_message(step, numbers))
        return [step]

    def _verify_together(self, step: int) -> tuple[Problem | None, Manifest | None]:
        """Each process hashes its share of the files; all return the same verdict."""
        problem, manifest = self._disk.verify(
            step, part=jax.process_index(), parts=jax.process_count()
        )
        problems = _gather_problems(problem)
        for process, found in enumerate(problems):
            require_reached(found)
            if found and found.reason == "missing-manifest" and problems[0] is None:
                raise ConfigError(
                    f"process {process} does not see checkpoint step {step} in {self._disk.place}, "
                    "which process 0 does: run.directory must be on storage that all processes "
                    "share"
                )
        return _first(problems), manifest

    def _read_together(
        self, step: int, wanted: Mapping[str, Any]
    ) -> tuple[Problem | None, Mapping[str, Any]]:
        problem, arrays = None, {}
        try:
            arrays = read_arrays(self._disk.path(step), wanted, as_numpy=False)
        except Exception as error:
            problem = Problem("unreadable", STATE, _first_line(error))
        return _first(_gather_problems(problem)), arrays

    def _good(self, step: int | None, *, hashes: bool = True) -> tuple[int, Manifest]:
        """A verified step and its manifest, for one process that reads on its own."""
        if step is None:
            step, hashes = self.newest(), False
            if step is None:
                raise CheckpointError(
                    f"there is no checkpoint in {self._disk.place}: has the run saved one yet?"
                )
        if step not in self._disk.numbers():
            raise CheckpointError(self._missing_message(step, self._disk.numbers()))
        problem, manifest = self._disk.verify(step, hashes=hashes)
        require_reached(problem)
        if problem is not None or manifest is None:
            raise CheckpointError(self._damaged_message(step, problem))
        return step, manifest

    def _set_aside(self, bad: list[tuple[int, Problem]], good: int) -> None:
        """Warns of the damaged steps and renames them. Primary only."""
        for step, problem in bad:
            try:
                kept = f"it is kept as {self._disk.mark_bad(step, problem)}"
            except OSError as error:
                kept = f"it could not be renamed: {error}"
            _log.warning("%s; %s", self._skip_message(step, problem, good), kept)

    def _damaged_message(self, step: int, problem: Problem | None) -> str:
        return (
            f"checkpoint step {step} in {self._disk.place} is damaged ({problem}): restore it from "
            "a copy, or name another step"
        )

    def _skip_message(self, step: int, problem: Problem, good: int) -> str:
        return (
            f"checkpoint step {step} in {self._disk.place} is damaged ({problem}); "
            f"using step {good} instead"
        )

    def _missing_message(self, step: int, numbers: list[int]) -> str:
        there = ", ".join(map(str, sorted(numbers))) or "none"
        return f"there is no checkpoint step {step} in {self._disk.place}; there are: {there}"

    def _require_none_lost(self, bad: list[tuple[int, Problem]]) -> None:
        """Raises CheckpointError unless nothing was ever committed here."""
        lines = [f"  step {step}: {problem}" for step, problem in bad]
        lines += [f"  {name}: found damaged earlier" for name in self._disk.set_aside()]
        if lines:
            raise CheckpointError(
                f"no checkpoint in {self._disk.place} is intact, and the run does not silently "
                "start again from step 0:\n"
                + "\n".join(lines)
                + "\nRestore the files from a copy, or "
                "start anew with another run.directory"
            )

    def _require_fit(
        self, step: int, stored: Mapping[str, Leaf], wanted: Mapping[str, Leaf]
    ) -> None:
        table = difference_table(stored, wanted)
        if table is not None:
            raise CheckpointError(
                f"checkpoint step {step} in {self._disk.place} is of another model or optimizer: "
                f"{table}\nUse the configuration it was trained with, or another run.directory"
            )


def _gather_problems(problem: Problem | None) -> list[Problem | None]:
    """Every process's problem; a collective."""
    mine = "" if problem is None else json.dumps([problem.reason, problem.file, problem.detail])
    return [Problem(*json.loads(text)) if text else None for text in gather_texts(mine)]


def _first(problems: list[Problem | None]) -> Problem | None:
    return next((problem for problem in problems if problem is not None), None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _stored_bytes(named: Mapping[str, Any]) -> int:
    """What leaves take on disk, the little JSON beside them aside."""
    # The arrays are stored uncompressed; the index is small.
    return sum(leaf.size * leaf.dtype.itemsize + 2048 for leaf in named.values()) + 65536


def _require_global_arrays(named: Mapping[str, Any]) -> None:
    """Raises TypeError for a leaf that could not be stored, or not by all processes together."""
    several = jax.process_count() > 1
    for name, leaf in named.items():
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"state leaf {name} is a {type(leaf).__name__}, not a jax array")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"state leaf {name} is a typed random key: store its key_data")
        if several and leaf.is_fully_addressable:
            raise TypeError(f"state leaf {name} lives on one process, not on the mesh of all")
