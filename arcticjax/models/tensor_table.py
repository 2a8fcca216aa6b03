"""Rows of the tables between Hugging Face's tensor names and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """One kind of tensor: `{layer}` in the name is the index on the leading axis of our arrays.

    paths: our arrays, several where theirs holds them one after another along axis 0. `transform`
    turns either side's tensor into the other's, so it must be its own inverse. first_layer: layers
    before it have no such tensor.
    """

    hf_name: str
    paths: tuple[str, ...]
    transform: Callable[[np.ndarray], np.ndarray]
    first_layer: int = 0


def same(tensor: np.ndarray) -> np.ndarray:
    """The transform of tensors that both sides store alike."""
    return tensor


def dense(hf_name: str, *paths: str, bias: bool = True) -> Iterator[Entry]:
    """A dense layer, or several in one; torch.nn.Linear stores [out, in]."""
    yield Entry(f"{hf_name}.weight", tuple(f"{path}/kernel" for path in paths), np.transpose)
    if bias:
        yield Entry(f"{hf_name}.bias", tuple(f"{path}/bias" for path in paths), same)


def norm(hf_name: str, path: str, *, bias: bool = True, first_layer: int = 0) -> Iterator[Entry]:
    """A layer norm."""
    yield Entry(f"{hf_name}.weight", (f"{path}/scale",), same, first_layer)
    if bias:
        yield Entry(f"{hf_name}.bias", (f"{path}/bias",), same, first_layer)
