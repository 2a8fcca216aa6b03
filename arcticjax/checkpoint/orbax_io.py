"""The calls into Orbax: how arrays and JSON get to disk and back. Nothing else here imports it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    is not yet visible; what it raises fails the save.
    """

    def __init__(self, before_commit: Callable[[], None]) -> None:
        import orbax.checkpoint as ocp  # seconds to import: only runs that save pay

        # Replicas of one process would be cut up by small programs compiled at every first save,
        # and written by the same process all the same.
        arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=jax.process_count() > 1)
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                **{
                    # Trained floats hardly compress (8 %), and so their size is known before.
                    STATE: ocp.PyTreeCheckpointHandler(
                        use_compression=False,
                        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
                            (jax.Array, arrays)
                        ),
                    ),
                    META: ocp.JsonCheckpointHandler(META_FILE),
                }
            ),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=before_commit),
        )

    def start(self, path: epath.Path, named: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts writing; on return the arrays (by leaf path) may be donated."""
        import orbax.checkpoint as ocp

        items = {STATE: ocp.args.PyTreeSave(nest(named)), META: ocp.args.JsonSave(dict(meta))}
        self._checkpointer.save(path, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Blocks until the step is committed; raises what went wrong."""
        self._checkpointer.wait_until_finished()

    def close(self) -> None:
        """Waits and ends the threads."""
        with quiet():
            self._checkpointer.close()


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
