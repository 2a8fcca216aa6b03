"""Activations kept from the forward pass of a layer until its backward pass.

`jax.vjp` gives a function whose leaves are the arrays that the backward pass needs: the layer's
parameters, what all layers read, and activations. The activations of layer l in microbatch m go to
place (m, l) of buffers that outlive both loops, straight from where they are computed, and come
back from there; the rest is at hand anyway. A scan that is differentiated as a whole would stack
them first and have them copied twice more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from arcticjax.parallel.mesh import batch_sharding

Kept = list[jax.Array]
Pull = Callable[[jax.Array], tuple[Any, ...]]
# Gives the pullback again, from what was kept and what is at hand.
Restore = Callable[[Kept, Any], Pull]


def take_apart(pull: Pull, at_hand: Any) -> tuple[Kept, Restore]:
    """The activations that `pull` holds, and a function that makes it whole again.

    at_hand: a tree of arrays; those leaves that `pull` holds as they are, are not among the
    activations.
    """
    leaves, structure = jax.tree.flatten(pull)
    places = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves(at_hand))}
    known = [places.get(id(leaf)) for leaf in leaves]
    kept = [leaf for leaf, place in zip(leaves, known, strict=True) if place is None]

    def restore(kept: Kept, at_hand: Any) -> Pull:
        own, given = iter(kept), jax.tree.leaves(at_hand)
        return jax.tree.unflatten(
            structure, [next(own) if place is None else given[place] for place in known]
        )

    return kept, restore


def store(buffers: Kept, activations: Kept, *place: jax.Array | int) -> Kept:
    """The buffers with the activations at a place of their first axes."""
    return [
        lax.dynamic_update_slice(
            buffer, one.reshape((1,) * len(place) + one.shape), (*place, *(0,) * one.ndim)
        )
        for buffer, one in zip(buffers, activations, strict=True)
    ]


def load(buffers: Kept, *place: jax.Array | int) -> Kept:
    """The activations at a place of the buffers' first axes."""
    count = len(place)
    return [
        lax.dynamic_slice(
            buffer,
            (*place, *(0,) * (buffer.ndim - count)),
            (*(1,) * count, *buffer.shape[count:]),
        ).reshape(buffer.shape[count:])
        for buffer in buffers
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
