"""Several encoders as one, by averaging their weights.

A uniform soup is the mean of all (Wortsman et al., arXiv 2203.05482). Slerp goes from one to
another tensor by tensor: directions on the arc between them (Shoemake, SIGGRAPH 1985), lengths
linearly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from arcticjax.errors import ConfigError
from arcticjax.export.source import Source
from arcticjax.models.tokenizer import TextTokenizer

Method = Literal["uniform", "slerp"]

# Below this angle in radians an arc is a straight line to float64.
_STRAIGHT = 1e-6


def average(sources: Iterable[Source], method: Method, fraction: float = 0.5) -> Source:
    """One encoder from two or more with the same sizes, tokenizer and text contract.

    `sources` are taken one by one, so that two are in memory at most. fraction: where slerp, which
    takes exactly two, stands between them (0: the first, 1: the second). Raises ConfigError for
    another number of encoders and for encoders that differ in more than weights.
    """
    if not 0 <= fraction <= 1:
        raise ConfigError(f"fraction: {fraction} is not within 0 to 1")
    given = iter(sources)
    first = next(given, None)
    params, origins = None, []
    for source in given:
        assert first is not None
        _check_alike(first, source)
        if params is None:
            origins.append(first.origin)
            if method == "uniform":
                params = _map(lambda leaf: leaf.astype(np.float64), first.params)
            else:
                params = first.params
        elif method == "slerp":
            raise ConfigError("slerp goes between two checkpoints; name two, or average uniformly")
        origins.append(source.origin)
        if method == "uniform":
            params = _map(np.add, params, source.params)
        else:
            params = _slerp(params, source.params, fraction)
    if first is None or params is None:
        raise ConfigError("an average needs two checkpoints or more")
    if method == "uniform":
        params = _map(lambda leaf: (leaf / len(origins)).astype(np.float32), params)
        how = "mean"
    else:
        how = f"slerp at {fraction:g}"
    return dataclasses.replace(
        first,
        params=params,
        origin=f"{how} of {', '.join(origins)}",
        run=None,
        step=None,
        name=None,
        averaged=how,
    )


def _check_alike(first: Source, other: Source) -> None:
    """Raises ConfigError naming what two encoders differ in beside their weights."""
    found = []
    for kind, a, b in (
        ("model", first.spec, other.spec),
        ("text contract", first.contract, other.contract),
    ):
        old, new = dataclasses.asdict(a), dataclasses.asdict(b)
        found += [
            f"{kind} {name} {old[name]!r} and {new[name]!r}"
            for name in old
            if old[name] != new.get(name)
        ]
    if first.truncate_dim != other.truncate_dim:
        found.append(f"truncate_dim {first.truncate_dim} and {other.truncate_dim}")
    if not found:
        hashes = [
            TextTokenizer.from_file(source.tokenizer_folder).sha256 for source in (first, other)
        ]
        if hashes[0] != hashes[1]:
            found.append(f"tokenizer {hashes[0][:12]} and {hashes[1][:12]}")
    if found:
        raise ConfigError(
            f"{first.origin} and {other.origin} cannot be averaged: {'; '.join(found)}. Their "
            "weights mean different things; average checkpoints of one model only"
        )


def _slerp(first: Mapping[str, Any], second: Mapping[str, Any], fraction: float) -> dict[str, Any]:
    """Tensors as others count them: each layer's apart."""

    def one(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return _arc(a.astype(np.float64), b.astype(np.float64), fraction).astype(np.float32)

    def each(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.stack([one(x, y) for x, y in zip(a, b, strict=True)])

    return {
        name: _map(each if name == "layers" else one, part, second[name])
        for name, part in first.items()
    }


def _arc(a: np.ndarray, b: np.ndarray, fraction: float) -> np.ndarray:
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    if min(lengths) == 0:
        return (1 - fraction) * a + fraction * b
    u, v = a / lengths[0], b / lengths[1]
    # The arc cosine of the product loses half the digits of a small angle; this form does not.
    angle = 2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))
    # Opposite tensors have no arc between them.
    if min(angle, np.pi - angle) < _STRAIGHT:
        return (1 - fraction) * a + fraction * b
    weights = np.sin([(1 - fraction) * angle, fraction * angle]) / np.sin(angle)
    length = (1 - fraction) * lengths[0] + fraction * lengths[1]
    return length * (weights[0] * u + weights[1] * v)


def _map(function: Any, tree: Any, *others: Any) -> Any:
    """`function` of the leaves of nested dicts."""
    if isinstance(tree, Mapping):
        return {
            name: _map(function, part, *(other[name] for other in others))
            for name, part in tree.items()
        }
    return function(tree, *others)
