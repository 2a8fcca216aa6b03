"""Activations kept from a microbatch's forward pass until its backward pass.

`jax.vjp` gives a function whose leaves are the arrays that the backward pass needs: parameters, and
activations. The activations of microbatch m go to place m of buffers that outlive the loop, and
come back from there; the parameters are at hand anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from arcticjax.parallel.mesh import batch_sharding

Kept = list[jax.Array]
Pull = Callable[[jax.Array], tuple[Any]]


def take_apart(pull: Pull, params: Any) -> tuple[Kept, Callable[[Kept], Pull]]:
    """The activations that `pull` holds, and a function that makes it whole again from such.

    params: what was differentiated at; those of its leaves that `pull` holds as they are are not
    among the activations.
    """
    leaves, structure = jax.tree.flatten(pull)
    constant = {id(leaf): leaf for leaf in jax.tree.leaves(params)}
    known = [constant.get(id(leaf)) for leaf in leaves]
    activations = [leaf for leaf, same in zip(leaves, known, strict=True) if same is None]

    def whole(kept: Kept) -> Pull:
        own = iter(kept)
        return jax.tree.unflatten(
            structure, [next(own) if same is None else same for same in known]
        )

    return activations, whole


def store(buffers: Kept, activations: Kept, microbatch: jax.Array) -> Kept:
    """The buffers with the activations at place `microbatch`."""
    return [
        jax.lax.dynamic_update_index_in_dim(buffer, one, microbatch, 0)
        for buffer, one in zip(buffers, activations, strict=True)
    ]


def load(buffers: Kept, microbatch: jax.Array) -> Kept:
    """The activations at place `microbatch`."""
    return [
        jax.lax.dynamic_index_in_dim(buffer, microbatch, 0, keepdims=False) for buffer in buffers
    ]


def buffer_bytes(shapes: Sequence[jax.ShapeDtypeStruct]) -> int:
    """Bytes of such buffers on one device, given their shapes on all (axis 0)."""
    return sum(one.size // one.shape[0] * one.dtype.itemsize for one in shapes)


def allocate(shapes: Sequence[jax.ShapeDtypeStruct], mesh: Mesh) -> Kept:
    """Buffers of zeros, axis 0 over the devices of the mesh."""
    make = jax.jit(
        lambda: [jnp.zeros(one.shape, one.dtype) for one in shapes],
        out_shardings=batch_sharding(mesh),
    )
    return make()
