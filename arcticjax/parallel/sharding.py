"""How parameters, gradients and the optimiser's state lie on the mesh.

Parameters are whole on every device, but for the matrices of the layers: those are shared by the
`fsdp` devices (`RULES`), cut along their first axis after the layer's.

The optimiser's state and what it works on are shared by all devices (ZeRO stage 1, Rajbhandari et
al. 2020, arXiv 1910.02054). No axis of a table of 30,522 x 384 numbers divides among 256 devices,
so a leaf is flattened to [layers, numbers] ([1, numbers] outside the layers) and padded, and each
device has one piece of the numbers. Pieces stand in the order of the flattened leaf, and the
padding is the same for all meshes whose size divides `ALIGNMENT`: a checkpoint of one is a
checkpoint of the others.

The functions of `Sharding` that move numbers are to be called inside `shard_map`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from arcticjax import errors
from arcticjax.parallel.mesh import SLICE, replicated

# Path of a parameter -> how it lies on the mesh; the first that matches the whole path counts.
RULES = (
    (r"(.*/)?layers/.*/kernel", P(None, "fsdp")),
    (r".*", P()),
)
# Axes along which pieces differ, in the order of flattened numbers: fsdp outermost, because its
# devices' parameters are themselves consecutive parts. Slices repeat them.
PIECE_AXES = ("fsdp", "data")
PIECES = P(None, PIECE_AXES)
# Numbers of a flattened leaf are padded to a multiple of this.
ALIGNMENT = 256


@dataclass(frozen=True)
class Sharding:
    """The layout of a tree of trainable arrays on a mesh.

    specs: `PartitionSpec` of every leaf as a parameter; paths: its path; both as the leaves' tree.
    """

    mesh: Mesh
    paths: Any
    specs: Any

    def scatter(self, gradients: Any) -> Any:
        """Sums gradients over the devices and gives each its pieces: one reduce-scatter a leaf."""

        def one(leaf: jax.Array, path: str, spec: P) -> jax.Array:
            flat = self._flatten(leaf, path, spec)
            piece = lax.psum_scatter(flat, self._shared_by(spec), scatter_dimension=1, tiled=True)
            return lax.psum(piece, SLICE)

        return jax.tree.map(one, gradients, self.paths, self.specs)

    def cut(self, params: Any) -> Any:
        """This device's pieces of parameters; moves nothing."""

        def one(leaf: jax.Array, path: str, spec: P) -> jax.Array:
            flat, axes = self._flatten(leaf, path, spec), self._shared_by(spec)
            size = flat.shape[1] // math.prod(self.mesh.shape[axis] for axis in axes)
            return lax.dynamic_slice_in_dim(flat, lax.axis_index(axes) * size, size, axis=1)

        return jax.tree.map(one, params, self.paths, self.specs)

    def join(self, pieces: Any, like: Any) -> Any:
        """Parameters, shaped as `like`, from the pieces of all devices: one all-gather a leaf."""

        def one(piece: jax.Array, leaf: jax.Array, spec: P) -> jax.Array:
            flat = lax.all_gather(piece, self._shared_by(spec), axis=1, tiled=True, to="invarying")
            return flat[:, : leaf.size // flat.shape[0]].reshape(leaf.shape)

        return jax.tree.map(one, pieces, like, self.specs)

    def gather_layer(self, layer: dict[str, Any]) -> dict[str, Any]:
        """One layer's parameters whole: its matrices from the devices that share them."""

        def one(path: Any, leaf: jax.Array) -> jax.Array:
            if _spec(f"layers/{_name(path)}") == P():
                return leaf
            return lax.all_gather(leaf, "fsdp", axis=0, tiled=True)

        return jax.tree_util.tree_map_with_path(one, layer)

    def whole(self, params: Any) -> Any:
        """The trainable `params` with a whole copy on every device; called outside `shard_map`."""
        return params if self.mesh.shape["fsdp"] == 1 else self._replicate(params)

    @cached_property
    def _replicate(self) -> Any:
        # Kept, so that no evaluation after the first compiles anything.
        return jax.jit(lambda same: same, out_shardings=replicated(self.mesh))

    def named(self, specs: Any) -> Any:
        """`specs` on the mesh."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)

    def _flatten(self, leaf: jax.Array, path: str, spec: P) -> jax.Array:
        flat = leaf.reshape(leaf.shape[0] if _stacked(path) else 1, -1)
        if spec != P():
            return flat
        padded = padded_size(flat.shape[1], self._parts())
        return jnp.pad(flat, ((0, 0), (0, padded - flat.shape[1])))

    def _parts(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in PIECE_AXES)

    def _shared_by(self, spec: P) -> tuple[str, ...]:
        """Axes along which a leaf's pieces differ where its parameter does not."""
        return PIECE_AXES if spec == P() else ("data",)


def make_sharding(params: Any, mesh: Mesh) -> Sharding:
    """The layout of `params` (arrays, or their shapes) on a mesh.

    Raises ConfigError where a matrix does not divide among the devices that share it, or where a
    rule matches nothing though `mesh.fsdp` needs it.
    """
    paths = jax.tree_util.tree_map_with_path(lambda path, _: _name(path), params)
    shared = mesh.shape["fsdp"] > 1
    specs = jax.tree.map(lambda path: _spec(path) if shared else P(), paths)
    if shared:
        names = jax.tree.leaves(paths)
        for pattern, _ in RULES:
            if not any(re.fullmatch(pattern, name) for name in names):
                raise errors.ConfigError(
                    f"mesh.fsdp: no parameter of this model matches {pattern}; its parameters are "
                    f"{', '.join(names[:5])} ..."
                )
        parts = mesh.shape["fsdp"] * mesh.shape["data"]
        for name, leaf, spec in zip(
            names, jax.tree.leaves(params), jax.tree.leaves(specs), strict=True
        ):
            if spec != P() and (
                leaf.shape[1] % mesh.shape["fsdp"] or leaf.size // leaf.shape[0] % parts
            ):
                raise errors.ConfigError(
                    f"mesh.fsdp: {name} of shape {leaf.shape} does not divide among fsdp "
                    f"{mesh.shape['fsdp']} x data {mesh.shape['data']} devices; lower mesh.fsdp"
                )
    return Sharding(mesh, paths, specs)


def padded_size(numbers: int, parts: int) -> int:
    """Numbers of a flattened leaf with its padding, for `parts` devices."""
    multiple = math.lcm(ALIGNMENT, parts)
    return -(-numbers // multiple) * multiple


def pieces_spec(leaf: Any) -> P:
    """How a leaf of the optimiser's state lies on the mesh: pieces are cut, counters are not."""
    return PIECES if leaf.ndim == 2 else P()


def _name(path: Any) -> str:
    """`layers/mlp/up/kernel` from a path of keys."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def _spec(path: str) -> P:
    return next(spec for pattern, spec in RULES if re.fullmatch(pattern, path))


def _stacked(path: str) -> bool:
    return "layers" in path.split("/")
