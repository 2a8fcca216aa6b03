"""Names, shapes and dtypes of the leaves of a state, and how two states differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

_ROWS_SHOWN = 20


@dataclass(frozen=True)
class Leaf:
    """Shape and dtype of one array, as stored or as wanted."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def name_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of a pytree by path ("params/layers/norm/scale"), in tree order.

    Optimizer states (named tuples) are named by their fields. Raises ValueError where two leaves
    would have one name, or where a name holds one of the separators "/" and ".".
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [_part(key) for key in path]
        if not parts or any(not part or "/" in part or "." in part for part in parts):
            raise ValueError(f"a state leaf cannot be named {parts!r}")
        name = "/".join(parts)
        if name in named:
            raise ValueError(f"two state leaves are named {name!r}")
        named[name] = leaf
    return named


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict of strings from leaves by path: the inverse of `name_leaves` for a dict tree."""
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def describe_leaves(named: Mapping[str, Any]) -> dict[str, Leaf]:
    """Shape and dtype of each leaf by path."""
    return {name: Leaf(tuple(leaf.shape), str(leaf.dtype)) for name, leaf in named.items()}


def difference_table(stored: Mapping[str, Leaf], wanted: Mapping[str, Leaf]) -> str | None:
    """A table of the leaves that differ in presence, shape or dtype, or None when none does."""
    names = [*wanted, *(name for name in stored if name not in wanted)]
    differing = [name for name in names if stored.get(name) != wanted.get(name)]
    if not differing:
        return None
    rows = [("leaf", "stored", "wanted")]
    for name in differing[:_ROWS_SHOWN]:
        rows.append((name, str(stored.get(name, "-")), str(wanted.get(name, "-"))))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"  {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in rows]
    if len(differing) > _ROWS_SHOWN:
        lines.append(f"  ... and {len(differing) - _ROWS_SHOWN} more")
    return f"{len(differing)} of {len(names)} leaves differ\n" + "\n".join(lines)


def _part(key: Any) -> str:
    match key:
        case DictKey() | FlattenedIndexKey():
            return str(key.key)
        case GetAttrKey():
            return key.name
        case SequenceKey():
            return str(key.idx)
    return str(key)
