"""The training state: what a step reads and writes, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from arcticjax.parallel import mesh as meshes
from arcticjax.parallel.sharding import Sharding, pieces_spec

State = dict[str, Any]


def trainable(state: State) -> dict[str, Any]:
    """The part of a state that has gradients: `params`, the encoder's, and `loss`, what the loss
    itself learns."""
    return {"params": state["params"], "loss": state["loss"]}


def init_state(arrays: Any, optimizer: optax.GradientTransformation, sharding: Sharding) -> State:
    """The state before step 0: {'step', 'params', 'loss', 'optimizer'}, on the mesh of `sharding`.

    arrays: fp32 host arrays of `trainable`. The optimiser's state lies in pieces.
    """
    mesh = sharding.mesh
    placed = meshes.place(arrays, sharding.named(sharding.specs))
    moments = jax.jit(_begin(arrays, optimizer, sharding))(placed)
    return {"step": meshes.replicate(mesh, jnp.int32(0)), **placed, "optimizer": moments}


def abstract_state(
    arrays: Any, optimizer: optax.GradientTransformation, sharding: Sharding
) -> State:
    """What `init_state` gives, as shapes, dtypes and shardings; the devices need not be there."""

    moments = jax.eval_shape(_begin(arrays, optimizer, sharding), arrays)
    specs = {
        "step": P(),
        **sharding.specs,
        "optimizer": jax.tree.map(pieces_spec, moments),
    }
    state = {"step": jax.ShapeDtypeStruct((), jnp.int32), **arrays, "optimizer": moments}
    return meshes.lying(state, sharding.named(specs))


def _begin(
    arrays: Any, optimizer: optax.GradientTransformation, sharding: Sharding
) -> Callable[[Any], Any]:
    """The optimiser's state of global `arrays`, in pieces."""
    any_pieces = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, 1), leaf.dtype), arrays)
    specs = jax.tree.map(pieces_spec, jax.eval_shape(optimizer.init, any_pieces))
    return jax.shard_map(
        lambda arrays: optimizer.init(sharding.cut(arrays)),
        mesh=sharding.mesh,
        in_specs=(sharding.specs,),
        out_specs=specs,
    )


def abstract(arrays: Any) -> Any:
    """Shapes, dtypes and shardings of a state or another tree of arrays."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), arrays
    )
