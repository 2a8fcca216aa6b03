"""The calls into Orbax: how arrays and JSON get to disk and back. Nothing else here imports it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from arcticjax.checkpoint.leaves import name_leaves, nest
from arcticjax.checkpoint.quiet import quiet

TEMPORARY = ".orbax-checkpoint-tmp"
STATE = "state"
META = "meta"
META_FILE = "metadata"


class AsyncWriter:
    """Writes one step at a time in the background and commits it by a rename.

    `before_commit` is called on process 0 when the files of all processes are written and the step
    is not yet visible; what it raises fails the save. alone: processes share no disk, so each
    writes its part of the arrays below a path of its own and waits for nobody; `before_commit` is
    called on each, and the parts become arrays by `merge`.
    """

    def __init__(self, before_commit: Callable[[], None], *, alone: bool = False) -> None:
        import orbax.checkpoint as ocp  # seconds to import: only runs that save pay

        several, rank = jax.process_count() > 1, jax.process_index()
        self._alone = alone and several
        if self._alone:
            processes = ocp.options.MultiprocessingOptions(
                primary_host=rank, active_processes={rank}, barrier_sync_key_prefix=f"only-{rank}"
            )
            self._arrays = _unmerged()
        else:
            processes = ocp.options.MultiprocessingOptions()
            self._arrays = ocp.PyTreeCheckpointHandler, ocp.args.PyTreeSave
        # Replicas of one process would be cut up by small programs compiled at every first save,
        # and written by the same process all the same.
        arrays = ocp.type_handlers.ArrayHandler(
            use_replica_parallel=several, primary_host=processes.primary_host
        )
        handlers: dict[str, Any] = {
            # Trained floats hardly compress (8 %), and so their size is known before.
            STATE: self._arrays[0](
                use_compression=False,
                type_handler_registry=ocp.type_handlers.create_type_handler_registry(
                    (jax.Array, arrays)
                ),
                multiprocessing_options=processes,
            ),
            META: ocp.JsonCheckpointHandler(META_FILE, multiprocessing_options=processes),
        }
        # What tells that a directory is made has one name for all processes: a process alone would
        # take another's for its own.
        asynchronous = ocp.options.AsyncOptions(
            post_finalization_callback=before_commit,
            create_directories_asynchronously=not self._alone,
        )
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(
                    multiprocessing_options=processes, async_options=asynchronous
                ),
                **handlers,
            ),
            async_options=asynchronous,
            multiprocessing_options=processes,
        )

    def start(self, path: epath.Path, named: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts writing; on return the arrays (by leaf path) may be donated."""
        import orbax.checkpoint as ocp

        items = {STATE: self._arrays[1](nest(named)), META: ocp.args.JsonSave(dict(meta))}
        self._checkpointer.save(path, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Blocks until the step is committed; raises what went wrong."""
        self._checkpointer.wait_until_finished()

    def close(self) -> None:
        """Waits and ends the threads."""
        with quiet():
            self._checkpointer.close()


def is_mine(name: str) -> bool:
    """Whether a file of a step, by its path, is for this process to keep, where all have written
    for themselves: its part of the arrays, and on process 0 what all have."""
    rank = jax.process_index()
    return rank == 0 or name.startswith(f"{STATE}/ocdbt.process_{rank}/")


def is_merged(names: Container[str]) -> bool:
    """Whether the arrays of a step with these files can be read as they are."""
    return f"{STATE}/manifest.ocdbt" in names


def merge(step: epath.Path) -> None:
    """Makes arrays of the parts that processes wrote alone, all of which must be here."""
    import orbax.checkpoint as ocp

    with quiet():
        ocp.PyTreeCheckpointHandler().finalize(step / STATE)


def read_arrays(step: epath.Path, wanted: Mapping[str, Any], *, as_numpy: bool) -> dict[str, Any]:
    """Reads leaves by path, in the order of `wanted` (ShapeDtypeStructs).

    They come as jax arrays with the shardings that `wanted` gives, or as NumPy arrays.
    """
    import orbax.checkpoint as ocp

    target = nest(wanted)
    if as_numpy:
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    else:
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
    with quiet():
        # The handler itself: Orbax's checkpointer adds a barrier, which hangs the other processes
        # when one fails, and reads files that the manifest does not cover.
        tree = ocp.PyTreeCheckpointHandler().restore(
            step / STATE,
            args=ocp.args.PyTreeRestore(item=target, restore_args=arguments, partial_restore=True),
        )
    arrays = name_leaves(tree)
    return {name: arrays[name] for name in wanted}


@functools.cache
def _unmerged() -> tuple[type, type]:
    """A handler of arrays that leaves the parts of processes apart, and its arguments."""
    import orbax.checkpoint as ocp

    class Unmerged(ocp.PyTreeCheckpointHandler):
        def finalize(self, directory: epath.Path) -> None:
            """The other processes' parts are not here."""

    @ocp.args.register_with_handler(Unmerged, for_save=True, for_restore=True)
    class UnmergedSave(ocp.args.PyTreeSave):
        pass

    return Unmerged, UnmergedSave
