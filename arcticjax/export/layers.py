"""Where two encoders that give other vectors for a text begin to differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from arcticjax.models.encoder import Encoder
from arcticjax.models.spec import ModelSpec
from arcticjax.parallel.mesh import local_mesh

# Of the largest value of a hidden state: ten times what float32 leaves after 24 layers.
RELATIVE_TOLERANCE = 2e-5


def states(
    spec: ModelSpec, params: Mapping[str, Any], tokens_S: np.ndarray
) -> Iterator[np.ndarray]:
    """Hidden states [S, D] of one text, float32: after the embeddings, then of the encoder that
    ends with layer 1, 2, ..."""
    params = jax.device_get(dict(params))
    tokens_RS = np.asarray(tokens_S, np.int32)[None]
    segments_RS = np.ones_like(tokens_RS)
    positions_RS = np.arange(tokens_RS.shape[1], dtype=np.int32)[None]
    yield _on_one_device(Encoder(spec).embedded, params, tokens_RS, positions_RS)
    for count in range(1, spec.num_layers + 1):
        encoder = Encoder(dataclasses.replace(spec, num_layers=count))
        layers = jax.tree.map(lambda leaf, end=count: leaf[:end], params["layers"])
        cut = {**params, "layers": layers}
        yield _on_one_device(encoder.hidden, cut, tokens_RS, segments_RS, positions_RS)


def first_difference(ours: Iterable[np.ndarray], theirs: Iterable[np.ndarray]) -> str | None:
    """The first place where two encoders' `states` differ, in words; None when none does."""
    for layer, (expected, found) in enumerate(zip(ours, theirs, strict=False)):
        name = f"layer {layer}" if layer else "the embeddings"
        if expected.shape != found.shape:
            return f"{name} (width {found.shape[-1]}, expected {expected.shape[-1]})"
        error = float(np.abs(expected - found).max())
        # NaN differs too.
        if not error <= RELATIVE_TOLERANCE * float(np.abs(expected).max()):
            return f"{name} (hidden states by up to {error:.3g})"
    return None


def _on_one_device(function: Callable[..., jax.Array], *arguments: Any) -> np.ndarray:
    # A run is under its own mesh when it exports.
    with jax.set_mesh(local_mesh()), jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(function)(*arguments)[0])
