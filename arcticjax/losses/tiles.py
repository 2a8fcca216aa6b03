"""Blocks of rows and tiles of columns: their cosines by Matryoshka size, and the way back.

Sizes are ascending. A number of an embedding takes part in the products of its own size and of all
larger ones, so products are summed up from one size to the next, and gradients the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from arcticjax.losses.labels import Contrast, Labels


class Tile(NamedTuple):
    """Some columns of one contrast; inverse norms are those of the sizes below the whole width."""

    columns_tD: jax.Array
    inverse_norms_tK: jax.Array
    groups_t: jax.Array
    numbers_t: jax.Array
    guide_tG: jax.Array | None


class Rows(NamedTuple):
    """Some rows of one contrast, with all that is known of them before the scores."""

    rows_rD: jax.Array
    inverse_norms_rK: jax.Array
    groups_r: jax.Array
    positives_rP: jax.Array
    limits_r: jax.Array | None
    guide_rG: jax.Array | None
    guide_limits_r: jax.Array | None


def slicers(contrast: Contrast, labels: Labels, limits, sizes: tuple[int, ...]):
    """Functions that cut rows and tiles out of a contrast."""
    columns = contrast.columns_TD.shape[0]
    row_norms_bK = _inverse_norms(contrast.rows_bD, sizes)
    column_norms_TK = _inverse_norms(contrast.columns_TD, sizes)
    limits_b, guide_limits_b = limits
    guide = contrast.guide
    all_rows = Rows(
        contrast.rows_bD,
        row_norms_bK,
        labels.row_groups_b,
        labels.positives_bP,
        limits_b,
        None if guide is None else guide.rows_bG,
        None if guide is None else guide_limits_b,
    )
    all_columns = Tile(
        contrast.columns_TD,
        column_norms_TK,
        contrast.column_groups_T,
        lax.iota(jnp.int32, columns),
        None if guide is None else guide.columns_TG,
    )

    def cut(parts, start, count: int):
        return jax.tree.map(lambda part: lax.dynamic_slice_in_dim(part, start, count), parts)

    def rows(start, count: int) -> Rows:
        return cut(all_rows, start, count)

    def tile(index, count: int) -> Tile:
        start, fresh_t = block_at(index, count, columns)
        some = cut(all_columns, start, count)
        if fresh_t is None:
            return some
        # -2 is no positive's number, not even "none".
        return some._replace(
            groups_t=jnp.where(fresh_t, some.groups_t, -1),
            numbers_t=jnp.where(fresh_t, some.numbers_t, -2),
        )

    return rows, tile


def tile_cosines(rows: Rows, tile: Tile, sizes: tuple[int, ...], first: bool):
    """Cosines by size, which of them are negatives, and where each positive of a row is."""
    raw_rt, cosines_Krt = None, []
    for index, (low, high) in enumerate(_segments(sizes)):
        part_rt = _matmul(rows.rows_rD[:, low:high], tile.columns_tD[:, low:high], ((1,), (1,)))
        raw_rt = part_rt if raw_rt is None else raw_rt + part_rt
        if index < rows.inverse_norms_rK.shape[1]:
            norms_r, norms_t = rows.inverse_norms_rK[:, index], tile.inverse_norms_tK[:, index]
            cosines_Krt.append(raw_rt * norms_r[:, None] * norms_t[None, :])
        else:
            cosines_Krt.append(raw_rt)
    negative_rt = (tile.groups_t >= 0)[None, :] & (tile.groups_t[None, :] != rows.groups_r[:, None])
    hits_Prt = []
    for slot in range(rows.positives_rP.shape[1] if first else 0):
        hits_rt = tile.numbers_t[None, :] == rows.positives_rP[:, slot, None]
        negative_rt = negative_rt & ~hits_rt
        hits_Prt.append(hits_rt)
    if rows.limits_r is not None:
        negative_rt = negative_rt & ~(cosines_Krt[-1] > rows.limits_r[:, None])  # keeps NaN
    if rows.guide_rG is not None and rows.guide_limits_r is not None:
        guided_rt = _matmul(rows.guide_rG, tile.guide_tG, ((1,), (1,)))
        negative_rt = negative_rt & ~(guided_rt > rows.guide_limits_r[:, None])
    return jnp.stack(cosines_Krt), negative_rt, hits_Prt


def pull(grad_Krt, rows: Rows, tile: Tile, sizes: tuple[int, ...]):
    """Gradients of rows and columns through the raw products: a number of an embedding is in the
    products of its own size and of all larger ones."""
    dtype = rows.rows_rD.dtype
    into_rows, into_columns, total_rt = [], [], None
    for index, (low, high) in reversed(list(enumerate(_segments(sizes)))):
        grad_rt = grad_Krt[index]
        if index < rows.inverse_norms_rK.shape[1]:
            norms_r, norms_t = rows.inverse_norms_rK[:, index], tile.inverse_norms_tK[:, index]
            grad_rt = grad_rt * norms_r[:, None] * norms_t[None, :]
        total_rt = grad_rt if total_rt is None else total_rt + grad_rt
        narrow_rt = total_rt.astype(dtype)
        into_rows.append(_matmul(narrow_rt, tile.columns_tD[:, low:high], ((1,), (0,))))
        into_columns.append(_matmul(narrow_rt, rows.rows_rD[:, low:high], ((0,), (0,))))
    width = rows.rows_rD.shape[1]
    if sizes[-1] < width:  # numbers that no size reaches
        for parts, like in ((into_rows, rows.rows_rD), (into_columns, tile.columns_tD)):
            parts.insert(0, jnp.zeros_like(like[:, sizes[-1] :], jnp.float32))
    if len(into_rows) == 1:
        return into_rows[0], into_columns[0]
    return jnp.concatenate(into_rows[::-1], axis=1), jnp.concatenate(into_columns[::-1], axis=1)


def positive_cosines(first: Contrast, positives_bP, sizes: tuple[int, ...]):
    """[sizes, b, P]: cosines of the positives; of column 0 where there is none (masked by the
    caller)."""
    row_norms_bK = _inverse_norms(first.rows_bD, sizes)
    found = []
    for slot in range(positives_bP.shape[1]):  # one slot at a time: b * D numbers, not b * P * D
        columns_bD = jnp.take(first.columns_TD, jnp.maximum(positives_bP[:, slot], 0), axis=0)
        column_norms_bK = _inverse_norms(columns_bD, sizes)
        raw_b, cosines_Kb = None, []
        for index, (low, high) in enumerate(_segments(sizes)):
            part_b = jnp.einsum(
                "rd,rd->r",
                first.rows_bD[:, low:high],
                columns_bD[:, low:high],
                precision=_precision(columns_bD),
                preferred_element_type=jnp.float32,
            )
            raw_b = part_b if raw_b is None else raw_b + part_b
            sliced = index < row_norms_bK.shape[1]
            scale_b = row_norms_bK[:, index] * column_norms_bK[:, index] if sliced else 1
            cosines_Kb.append(raw_b * scale_b)
        found.append(jnp.stack(cosines_Kb))
    return jnp.stack(found, axis=2)


def lowest_positive(cosines_bP, positives_bP):
    """[b]: the lowest cosine of a row's positives; infinite where there is none."""
    return jnp.min(jnp.where(positives_bP >= 0, cosines_bP, jnp.inf), axis=1)


def chosen_sizes(
    sizes: Sequence[tuple[int, float]] | None, width: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Matryoshka sizes, ascending, and their weights; None is the whole width with weight 1.

    Raises ValueError for a size that repeats or that an embedding does not have.
    """
    chosen = sorted(sizes or [(width, 1.0)])
    numbers = tuple(size for size, _ in chosen)
    if len(set(numbers)) < len(numbers) or not all(1 <= size <= width for size in numbers):
        raise ValueError(f"sizes {list(numbers)} must be distinct and between 1 and {width}")
    return numbers, tuple(float(weight) for _, weight in chosen)


def from_norms(texts_xD, sums_xK, sizes: tuple[int, ...]):
    """What normalising the slices takes off the gradient of the texts."""
    inverse_xK = _inverse_norms(texts_xD, sizes)
    scaled_xK = sums_xK[:, : inverse_xK.shape[1]] * inverse_xK**2
    # A number is in its own size and in all larger ones.
    from_here_xK = jnp.cumsum(scaled_xK[:, ::-1], axis=1)[:, ::-1]
    width = texts_xD.shape[1]
    factors = [
        jnp.broadcast_to(from_here_xK[:, index, None], (texts_xD.shape[0], high - low))
        for index, (low, high) in enumerate(_segments(sizes[: inverse_xK.shape[1]]))
    ]
    reached = sum(part.shape[1] for part in factors)
    factors.append(jnp.zeros_like(texts_xD[:, : width - reached], jnp.float32))
    return texts_xD.astype(jnp.float32) * jnp.concatenate(factors, axis=1)


def _inverse_norms(texts_xD, sizes: tuple[int, ...]):
    """[texts, sizes below the width]: one over the norm of the first numbers of each text."""
    sliced = [size for size in sizes if size < texts_xD.shape[1]]
    squares = jnp.square(texts_xD.astype(jnp.float32))
    norms = [jnp.sum(squares[:, :size], axis=1) for size in sliced]
    if not norms:
        return jnp.zeros_like(texts_xD[:, :0], jnp.float32)
    # An all-zero text (padding) has cosine 0 with everything.
    return lax.rsqrt(jnp.maximum(jnp.stack(norms, axis=1), 1e-24))


def _segments(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip((0, *sizes[:-1]), sizes, strict=True))


def _matmul(left, right, contracted: tuple[tuple[int, ...], tuple[int, ...]]):
    return lax.dot_general(
        left,
        right,
        (contracted, ((), ())),
        precision=_precision(left),
        preferred_element_type=jnp.float32,
    )


def _precision(operand) -> lax.Precision:
    return lax.Precision.HIGHEST if operand.dtype == jnp.float32 else lax.Precision.DEFAULT


def block_count(length: int, block: int) -> int:
    return -(-length // block)


def block_at(index, block: int, length: int):
    """Start of a block, moved back to end within `length`, and which places no earlier block had.

    The second is None when blocks divide the length.
    """
    wanted = index * block
    if length % block == 0:
        return wanted, None
    start = jnp.minimum(wanted, length - block)
    return start, start + lax.iota(jnp.int32, block) >= wanted
