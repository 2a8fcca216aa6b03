"""The training state: what a step reads and writes, and what a checkpoint holds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from arcticjax.parallel import mesh as meshes

State = dict[str, Any]


def init_state(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """The state before step 0: {'step', 'params', 'optimizer'}, a whole copy on every device.

    params: nested dict of fp32 host or device arrays.
    """
    params = meshes.replicate(mesh, params)
    sharding = meshes.replicated(mesh)
    moments = jax.jit(optimizer.init, out_shardings=sharding)(params)
    return {"step": meshes.replicate(mesh, jnp.int32(0)), "params": params, "optimizer": moments}


def abstract(arrays: Any) -> Any:
    """Shapes, dtypes and shardings of a state or another tree of arrays."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), arrays
    )
