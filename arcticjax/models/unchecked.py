"""Kernels inside a `shard_map` that checks along which mesh axes arrays vary.

A Pallas kernel says nothing of that, and `check_vma=True` insists on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P


def without_check(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's results: computed in a `shard_map` of its own without the check, over no
    further axis, and marked as varying along every axis that an argument varies along."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return function(*arguments)
    results = jax.shard_map(function, in_specs=P(), out_specs=P(), check_vma=False)(*arguments)
    types = (jax.typeof(one).mat.varying for one in jax.tree.leaves(arguments))
    axes = frozenset[Any]().union(*types)

    def vary(leaf: jax.Array) -> jax.Array:
        missing = tuple(axes - jax.typeof(leaf).mat.varying)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, results)
