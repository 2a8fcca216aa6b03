"""The norm of `arcticjax.models.norm` as two Pallas kernels for NVIDIA GPUs.

XLA reads a row for its mean, again for its deviation, and again to normalise it. These read it
once, and once more in the backward pass; the speed of memory is the whole cost there.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Rows that a program holds at a time, and its warps.
_FORWARD = 2, 1
# The same of the backward pass; there a program takes so many rows so many times, because it leaves
# sums over all its rows, of which there should be few.
_BACKWARD = 1, 2
_TURNS = 16
# Triton's arrays have powers of two for sides, so a row is taken in pieces; of fewer numbers than
# this they would be too many.
_NARROWEST = 64


def fits(rows: int, width: int) -> bool:
    """Whether the kernels take so many rows of `width` numbers."""
    blocks = _FORWARD[0], _BACKWARD[0] * _TURNS
    return not any(rows % block for block in blocks) and _piece(width) >= _NARROWEST


def forward(
    parts: tuple[Float[Array, "*rows D"], ...],
    bias: Float[Array, " D"] | None,
    scale: Float[Array, " D"],
    shift: Float[Array, " D"] | None,
    epsilon: float,
    dtype: jax.typing.DTypeLike,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows"], Float[Array, "*rows"]]:
    """The normalised sum in `dtype`, the mean of every row and the inverse of its deviation."""
    shape, width = parts[0].shape, parts[0].shape[-1]
    pieces = _pieces(width)

    def kernel(parts: Any, of_all: Any, results: Any) -> None:
        bias, scale, shift = of_all
        normal_ref, mean_ref, inverse_ref = results
        totals = [_total(parts, bias, slice(None), piece) for piece in pieces]
        mean = _over_row(totals, width)
        centred = [total - mean[:, None] for total in totals]
        inverse = lax.rsqrt(_over_row([one * one for one in centred], width) + epsilon)
        for piece, one in zip(pieces, centred, strict=True):
            normal = one * inverse[:, None] * scale[piece]
            normal = normal if shift is None else normal + shift[piece]
            normal_ref[:, piece] = normal.astype(normal_ref.dtype)
        mean_ref[...], inverse_ref[...] = mean, inverse

    rows = [_rows(part) for part in parts]
    count = len(rows[0])
    statistic = jax.ShapeDtypeStruct((count,), jnp.float32)
    results = jax.ShapeDtypeStruct((count, width), dtype), statistic, statistic
    normal, mean, inverse = _call(
        kernel, rows, (bias, scale, shift), results, *_FORWARD, "norm_forward", interpret
    )
    return normal.reshape(shape), mean.reshape(shape[:-1]), inverse.reshape(shape[:-1])


def backward(
    parts: tuple[Float[Array, "*rows D"], ...],
    bias: Float[Array, " D"] | None,
    scale: Float[Array, " D"],
    mean: Float[Array, "*rows"],
    inverse: Float[Array, "*rows"],
    wanted: Float[Array, "*rows D"],
    *,
    interpret: bool = False,
) -> tuple[
    tuple[Float[Array, "*rows D"], ...], Float[Array, " D"], Float[Array, " D"], Float[Array, " D"]
]:
    """The gradients of the parts, in their dtype, of the bias, the scale and the shift."""
    shape, width = parts[0].shape, parts[0].shape[-1]
    pieces = _pieces(width)
    at_once, warps = _BACKWARD

    def kernel(of_rows: Any, of_all: Any, results: Any) -> None:
        (parts, mean, inverse, wanted), (bias, scale) = of_rows, of_all
        of_part, sums_ref = results

        def turn(index: Array, sums: Any) -> Any:
            rows = pl.ds(index * at_once, at_once)
            of_normal = [wanted[rows, piece].astype(jnp.float32) for piece in pieces]
            deviation = inverse[rows][:, None]
            normal = [
                (_total(parts, bias, rows, piece) - mean[rows][:, None]) * deviation
                for piece in pieces
            ]
            scaled = [one * scale[piece] for one, piece in zip(of_normal, pieces, strict=True)]
            along = _over_row([a * b for a, b in zip(scaled, normal, strict=True)], width)
            level = _over_row(scaled, width)
            found = []
            for piece, a, b in zip(pieces, scaled, normal, strict=True):
                of_sum = deviation * (a - level[:, None] - b * along[:, None])
                # Of what flows on, the rounded gradient, is the bias's the sum.
                of_part[rows, piece] = of_sum = of_sum.astype(of_part.dtype)
                found.append(of_sum.astype(jnp.float32))
            new = found, [a * b for a, b in zip(of_normal, normal, strict=True)], of_normal
            return jax.tree.map(jnp.add, sums, new)

        zeros = [jnp.zeros((at_once, piece.size), jnp.float32) for piece in pieces]
        sums = lax.fori_loop(0, _TURNS, turn, (zeros, zeros, zeros))
        for index, one in enumerate(sums):
            for piece, some in zip(pieces, one, strict=True):
                sums_ref[0, index, piece] = some.sum(0)

    rows = [_rows(part) for part in parts]
    count = len(rows[0])
    block = at_once * _TURNS
    of_part, sums = _call(
        kernel,
        (rows, mean.reshape(-1), inverse.reshape(-1), _rows(wanted)),
        (bias, scale),
        (
            jax.ShapeDtypeStruct((count, width), parts[0].dtype),
            jax.ShapeDtypeStruct((count // block, 3, width), jnp.float32),
        ),
        block,
        warps,
        "norm_backward",
        interpret,
    )
    of_bias, of_scale, of_shift = sums.sum(0)
    return (of_part.reshape(shape),) * len(parts), of_bias, of_scale, of_shift


def _call(
    kernel: Any,
    of_rows: Any,
    of_all: Any,
    results: Any,
    block: int,
    warps: int,
    name: str,
    interpret: bool,
) -> Any:
    """Calls the kernel for every `block` of rows, with references to them, to `of_all` whole, and
    to its part of the results: as many of their rows as there are to a block."""
    by_row, structure = jax.tree.flatten(of_rows)
    whole, structure_of_all = jax.tree.flatten(of_all)
    blocks = len(by_row[0]) // block

    def part(array: Any) -> pl.BlockSpec:
        return pl.BlockSpec(
            (array.shape[0] // blocks, *array.shape[1:]),
            lambda index: (index, *(0,) * (array.ndim - 1)),
        )

    def unflattened(*references: Any) -> None:
        given, rest = references[: len(by_row)], references[len(by_row) :]
        kernel(
            structure.unflatten(given),
            structure_of_all.unflatten(rest[: len(whole)]),
            rest[len(whole) :],
        )

    return pl.pallas_call(
        unflattened,
        grid=(blocks,),
        in_specs=[
            *map(part, by_row),
            *(pl.BlockSpec(one.shape, lambda index: (0,)) for one in whole),
        ],
        out_specs=[part(one) for one in results],
        out_shape=list(results),
        compiler_params=triton.CompilerParams(num_warps=warps),
        interpret=interpret,
        name=name,
    )(*by_row, *whole)


def _total(parts: Any, bias: Any, rows: Any, piece: Any) -> Array:
    """A piece of the rows of the sum."""
    total = functools.reduce(jnp.add, (part[rows, piece].astype(jnp.float32) for part in parts))
    return total if bias is None else total + bias[piece]


def _over_row(pieces: list[Array], width: int) -> Array:
    """The mean of every row, of which these are all pieces."""
    first, *others = (piece.sum(-1) for piece in pieces)
    return sum(others, start=first) / width


def _pieces(width: int) -> list[Any]:
    size = _piece(width)
    return [pl.ds(start, size) for start in range(0, width, size)]


def _piece(width: int) -> int:
    """The largest power of two that divides the width."""
    return width & -width


def _rows(array: Array) -> Array:
    return array.reshape(-1, array.shape[-1])
