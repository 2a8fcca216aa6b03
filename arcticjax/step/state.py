"""The training state: what a step reads and writes, and what a checkpoint holds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

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

    def begin(arrays: Any) -> Any:
        return optimizer.init(sharding.cut(arrays))

    pieces = jax.eval_shape(
        lambda: optimizer.init(jax.tree.map(lambda leaf: jnp.zeros((1, 1), leaf.dtype), arrays))
    )
    specs = jax.tree.map(pieces_spec, pieces)
    moments = jax.jit(jax.shard_map(begin, mesh=mesh, in_specs=(sharding.specs,), out_specs=specs))(
        placed
    )
    return {"step": meshes.replicate(mesh, jnp.int32(0)), **placed, "optimizer": moments}


def abstract(arrays: Any) -> Any:
    """Shapes, dtypes and shardings of a state or another tree of arrays."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), arrays
    )
