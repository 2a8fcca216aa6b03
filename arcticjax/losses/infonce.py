"""InfoNCE over gathered documents, in tiles: no array as large as rows times columns exists.

A row is a query of this device, a column a document of the whole batch. With s = cosine /
temperature, a row i and one of its positives p give one term

    softplus(L_i - s_ip),   L_i = logsumexp of s_ij over the negatives j of row i

where the negatives of a row are all real columns of another group that are not its positives. This
is the cross entropy of p against p and the negatives, -log(exp(s_ip) / (exp(s_ip) + sum_j
exp(s_ij))): positives of one row never contend with each other. `reference.dense_infonce` says the
same with the whole matrix.

Written so, the gradient with respect to s_ip is -w_ip, w_ip = sigmoid(L_i - s_ip), and with respect
to s_ij it is (sum_p w_ip) exp(s_ij - L_i): the positive's weight is minus the sum of the others by
construction. The usual forms subtract two numbers near 1 instead, and lose every digit once pairs
are well separated.

Further matrices (`Contrast`: query against queries, document against documents or queries) add
negatives to L_i (the improved contrastive loss of GTE, arXiv 2308.03281, section 3.2).

Matryoshka (arXiv 2205.13147): the first k numbers of each embedding, normalised again, must do the
same task. Products of a tile are summed up from one size to the next, so all sizes together cost
the multiplications of the largest.

Equivalence. Any tile size, row block, order of columns and division of rows over devices gives the
same sums and gradients up to fp32 rounding: a term needs its own row and all documents, and nothing
of other rows. On several devices, with documents gathered by `all_gather(..., tiled=True)` inside
`shard_map(check_vma=True)`, the gradient of `psum(loss) / psum(count)` is the one-device gradient:
the gather's transpose (a reduce-scatter) adds what each device owes to a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from arcticjax.losses.labels import Contrast, Guide, Labels, LossSums
from arcticjax.losses.tiles import (
    block_at,
    block_count,
    chosen_sizes,
    from_norms,
    lowest_positive,
    positive_cosines,
    pull,
    slicers,
    tile_cosines,
)

# Scores held at once (8 MiB in fp32): rows are taken in blocks of this over `tile`, of a wide tile
# in blocks as long as it is wide, up to a limit.
SCORES_AT_ONCE = 2**21
_LONGEST_BLOCK = 4096
# Below every score, and finite, so that differences of it are numbers.
FLOOR = -1e30


class _Options(NamedTuple):
    """What is known when the program is traced."""

    tile: int
    rows: int
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    margin: float | None
    guide_margin: float


def tiled_infonce(
    queries_bD: jax.Array,
    documents_TD: jax.Array,
    labels: Labels,
    *,
    temperature: float | jax.Array,
    tile: int,
    row_block: int | None = None,
    sizes: Sequence[tuple[int, float]] | None = None,
    contrasts: Sequence[Contrast] = (),
    margin: float | None = None,
    guide: Guide | None = None,
    guide_margin: float = 0.0,
) -> LossSums:
    """InfoNCE sums of this device's queries against all documents, `tile` columns at a time.

    Embeddings are L2-normalised and of one dtype. `tile` need not divide T and may exceed it.
    `row_block` rows are scored at once (None: see `SCORES_AT_ONCE`).
    sizes: Matryoshka, (leading dimensions, weight) each; None is the whole embedding with weight 1.
    contrasts: further negatives of each row.
    margin: a column whose cosine exceeds that of the row's lowest positive by more than this is
        taken for a false negative and left out (cosines, so that signs do not matter).
    guide: leaves out columns by the cosines of another model in the same way, with a margin of its
        own, `guide_margin`.

    Scores, logsumexp and gradient sums are fp32. fp32 inputs are multiplied at full precision on
    every backend (a TPU would otherwise round them to bf16); bf16 inputs are multiplied as bf16
    with fp32 accumulation, softmax weights rounded to bf16 in the backward pass: the caller chooses
    by casting. Gradients flow to all embeddings but the guide's, and to `temperature`; no second
    derivatives. Scores are recomputed in the backward pass. No scatter is used, so results are
    deterministic.

    Raises ValueError when shapes or dtypes do not fit each other.
    """
    first = Contrast(queries_bD, documents_TD, labels.column_groups_T, guide)
    contrasts = (first, *contrasts)
    _check(contrasts, labels)
    numbers, weights = chosen_sizes(sizes, queries_bD.shape[1])
    if tile < 1 or (row_block is not None and row_block < 1):
        raise ValueError(f"tile and row_block must be at least 1, got {tile} and {row_block}")
    tile = min(tile, max(contrast.columns_TD.shape[0] for contrast in contrasts))
    at_once = max(SCORES_AT_ONCE // tile, min(tile, _LONGEST_BLOCK)) // len(numbers)
    rows = min(row_block or max(1, at_once), queries_bD.shape[0])
    options = _Options(tile, rows, numbers, weights, margin, guide_margin)
    # One varying type for all, so that the rules below need no care for devices; where something
    # replicated comes in, the transpose of this cast adds the devices' gradients.
    contrasts, temperature, labels = _vary_alike(
        (contrasts, jnp.asarray(temperature, jnp.float32), labels)
    )
    embeddings = tuple((one.rows_bD, one.columns_TD) for one in contrasts)
    fixed = (tuple((one.column_groups_T, one.guide) for one in contrasts), labels)
    return _tiled(embeddings, temperature, fixed, options)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _tiled(embeddings, temperature, fixed, options: _Options) -> LossSums:
    return _forward(embeddings, temperature, fixed, options)[0]


def _forward(embeddings, temperature, fixed, options: _Options):
    contrasts, labels = _together(embeddings, fixed)
    first = contrasts[0]
    cosines_KbP = positive_cosines(first, labels.positives_bP, options.sizes)
    positives_KbP = cosines_KbP / temperature
    limits = _limits(first, labels.positives_bP, cosines_KbP[-1], options)
    largest_Kb, total_Kb = _row_statistics(first, labels, temperature, limits, options, True)
    largest_of_documents_b = largest_Kb[-1]
    contested_by_documents_b = total_Kb[-1] != 0  # also true of NaN, which must reach the loss
    for contrast in contrasts[1:]:
        more_Kb, more_total_Kb = _row_statistics(
            contrast, labels, temperature, limits, options, False
        )
        larger_Kb = jnp.maximum(largest_Kb, more_Kb)
        total_Kb = total_Kb * jnp.exp(largest_Kb - larger_Kb)
        total_Kb = total_Kb + more_total_Kb * jnp.exp(more_Kb - larger_Kb)
        largest_Kb = larger_Kb
    valid_bP = (labels.positives_bP >= 0) & (labels.row_groups_b >= 0)[:, None]
    # FLOOR where a row has no negatives: its terms and their gradients come out as exactly 0.
    negatives_Kb = largest_Kb + jnp.log(jnp.where(total_Kb != 0, total_Kb, 1))
    gap_KbP = negatives_Kb[:, :, None] - positives_KbP
    term_KbP = jnp.maximum(gap_KbP, 0) + jnp.log1p(jnp.exp(-jnp.abs(gap_KbP)))
    size_weights_K = jnp.asarray(options.weights, jnp.float32)
    positive_bP = positives_KbP[-1]
    hardest_b = jnp.where(contested_by_documents_b, largest_of_documents_b, 0)

    def total(values_bP):
        return jnp.sum(jnp.where(valid_bP, values_bP, 0), dtype=jnp.float32)

    sums = LossSums(
        loss=total(jnp.sum(size_weights_K[:, None, None] * term_KbP, axis=0)),
        count=total(jnp.ones_like(positive_bP)),
        correct=total((positive_bP > largest_of_documents_b[:, None]).astype(jnp.float32)),
        positive_score=total(positive_bP) * temperature,
        hardest_negative_score=total(hardest_b[:, None] * jnp.ones_like(positive_bP)) * temperature,
    )
    weights_KbP = size_weights_K[:, None, None] * _sigmoid(gap_KbP)
    weights_KbP = jnp.where(valid_bP[None], weights_KbP, 0)
    return sums, (embeddings, temperature, fixed, limits, negatives_Kb, weights_KbP)


def _backward(options: _Options, residuals, cotangents: LossSums):
    embeddings, temperature, fixed, limits, negatives_Kb, weights_KbP = residuals
    contrasts, labels = _together(embeddings, fixed)
    # score = cosine / temperature: its derivative goes into K * b * P numbers instead of b * T.
    weights_KbP = weights_KbP * (cotangents.loss / temperature)
    found, product = [], jnp.float32(0)
    for index, contrast in enumerate(contrasts):
        rows_grad_bD, columns_grad_TD, part = _gradients(
            contrast, labels, temperature, limits, negatives_Kb, weights_KbP, options, index == 0
        )
        product = product + part
        found.append(
            (
                rows_grad_bD.astype(contrast.rows_bD.dtype),
                columns_grad_TD.astype(contrast.columns_TD.dtype),
            )
        )
    return tuple(found), -product / temperature, None


_tiled.defvjp(_forward, _backward)


def _together(embeddings, fixed) -> tuple[list[Contrast], Labels]:
    parts, labels = fixed
    return [
        Contrast(rows, columns, groups, guide)
        for (rows, columns), (groups, guide) in zip(embeddings, parts, strict=True)
    ], labels


def _row_statistics(
    contrast: Contrast, labels: Labels, temperature, limits, options: _Options, first: bool
):
    """Largest negative score of a row, and sum of exp(negative - largest), by Matryoshka size.

    Online logsumexp: a tile with a larger maximum rescales the sum so far. A row without negatives
    keeps (FLOOR, 0). `first`: whether the columns are those that labels speak of.
    """
    b, count = contrast.rows_bD.shape[0], len(options.sizes)
    columns = contrast.columns_TD.shape[0]
    tile = min(options.tile, columns)
    slice_rows, slice_tile = slicers(contrast, labels, limits, options.sizes)

    def row_step(block, carry):
        start, _ = block_at(block, options.rows, b)
        rows = slice_rows(start, options.rows)

        def tile_step(index, statistics):
            largest_Kr, total_Kr = statistics
            cosines_Krt, negative_rt, _ = tile_cosines(
                rows, slice_tile(index, tile), options.sizes, first
            )
            scores_Krt = jnp.where(negative_rt[None], cosines_Krt / temperature, -jnp.inf)
            larger_Kr = jnp.maximum(largest_Kr, jnp.max(scores_Krt, axis=2))
            fresh_Kr = jnp.sum(jnp.exp(scores_Krt - larger_Kr[:, :, None]), axis=2)
            return larger_Kr, total_Kr * jnp.exp(largest_Kr - larger_Kr) + fresh_Kr

        shape = (count, options.rows)
        empty = (jnp.full(shape, FLOOR, jnp.float32), jnp.zeros(shape, jnp.float32))
        found = lax.fori_loop(
            0, block_count(columns, tile), tile_step, _vary_as(contrast.rows_bD, empty)
        )
        return tuple(
            lax.dynamic_update_slice_in_dim(whole, part, start, 1)
            for whole, part in zip(carry, found, strict=True)
        )

    start = (jnp.zeros((count, b), jnp.float32), jnp.zeros((count, b), jnp.float32))
    return lax.fori_loop(
        0, block_count(b, options.rows), row_step, _vary_as(contrast.rows_bD, start)
    )


def _gradients(
    contrast: Contrast,
    labels: Labels,
    temperature,
    limits,
    negatives_Kb,
    weights_KbP,
    options: _Options,
    first: bool,
):
    """fp32 gradients of rows and columns, and the sum of cosine times its gradient.

    Each tile of scores serves both sides. A cosine of a normalised slice is raw product times both
    inverse norms; what the norms add to the gradient is, for a text x of norm n, -x / n^2 times its
    own sum of cosine times gradient.
    """
    b, width = contrast.rows_bD.shape
    columns = contrast.columns_TD.shape[0]
    tile, rows = min(options.tile, columns), options.rows
    sliced = options.sizes != (width,)
    slice_rows, slice_tile = slicers(contrast, labels, limits, options.sizes)
    sums = len(options.sizes) if sliced else 0

    def tile_step(index, carry):
        one_tile = slice_tile(index, tile)
        first_column, _ = block_at(index, tile, columns)

        def row_step(block, carry):
            rows_grad_bD, row_sums_bK, columns_grad_tD, column_sums_tK = carry
            start, fresh_r = block_at(block, rows, b)
            some = slice_rows(start, rows)
            negatives_Kr = lax.dynamic_slice_in_dim(negatives_Kb, start, rows, 1)
            weights_KrP = lax.dynamic_slice_in_dim(weights_KbP, start, rows, 1)
            if fresh_r is not None:
                weights_KrP = jnp.where(fresh_r[None, :, None], weights_KrP, 0)
            cosines_Krt, negative_rt, hits_Prt = tile_cosines(some, one_tile, options.sizes, first)
            scores_Krt = jnp.where(negative_rt[None], cosines_Krt / temperature, -jnp.inf)
            grad_Krt = jnp.sum(weights_KrP, axis=2)[:, :, None] * jnp.exp(
                scores_Krt - negatives_Kr[:, :, None]
            )
            for slot, hits_rt in enumerate(hits_Prt):
                grad_Krt = jnp.where(
                    hits_rt[None], grad_Krt - weights_KrP[:, :, slot, None], grad_Krt
                )
            if sliced:
                products_Krt = grad_Krt * cosines_Krt
                row_sums_bK = _add_rows(row_sums_bK, jnp.sum(products_Krt, axis=2).T, start)
                column_sums_tK = column_sums_tK + jnp.sum(products_Krt, axis=1).T
            into_rows_rD, into_columns_tD = pull(grad_Krt, some, one_tile, options.sizes)
            return (
                _add_rows(rows_grad_bD, into_rows_rD, start),
                row_sums_bK,
                columns_grad_tD + into_columns_tD,
                column_sums_tK,
            )

        rows_grad_bD, row_sums_bK, columns_grad_TD, column_sums_TK = carry
        # The last tile may lie over the one before: it adds to what is there.
        parts = (
            lax.dynamic_slice_in_dim(columns_grad_TD, first_column, tile),
            lax.dynamic_slice_in_dim(column_sums_TK, first_column, tile),
        )
        rows_grad_bD, row_sums_bK, grad_tD, sums_tK = lax.fori_loop(
            0, block_count(b, rows), row_step, (rows_grad_bD, row_sums_bK, *parts)
        )
        return (
            rows_grad_bD,
            row_sums_bK,
            lax.dynamic_update_slice_in_dim(columns_grad_TD, grad_tD, first_column, 0),
            lax.dynamic_update_slice_in_dim(column_sums_TK, sums_tK, first_column, 0),
        )

    shapes = ((b, width), (b, sums), (columns, width), (columns, sums))
    start = _vary_as(contrast.rows_bD, tuple(jnp.zeros(shape, jnp.float32) for shape in shapes))
    rows_grad_bD, row_sums_bK, columns_grad_TD, column_sums_TK = lax.fori_loop(
        0, block_count(columns, tile), tile_step, start
    )
    if not sliced:
        # The sum over a row of cosine times gradient is the row's product with its own gradient.
        rows_bD = contrast.rows_bD.astype(jnp.float32)
        return rows_grad_bD, columns_grad_TD, jnp.sum(rows_bD * rows_grad_bD)
    return (
        rows_grad_bD - from_norms(contrast.rows_bD, row_sums_bK, options.sizes),
        columns_grad_TD - from_norms(contrast.columns_TD, column_sums_TK, options.sizes),
        jnp.sum(row_sums_bK),
    )


def _limits(first: Contrast, positives_bP, cosines_bP, options: _Options):
    """Cosines above which a column is no negative of a row, by the model and by the guide."""
    limits_b, guide_limits_b = None, None
    if options.margin is not None:
        limits_b = lowest_positive(cosines_bP, positives_bP) + options.margin
    if first.guide is not None:
        guide = Contrast(*first.guide, first.column_groups_T)
        width = first.guide.rows_bG.shape[1]
        guided_bP = positive_cosines(guide, positives_bP, (width,))[0]
        guide_limits_b = lowest_positive(guided_bP, positives_bP) + options.guide_margin
    return limits_b, guide_limits_b


def _add_rows(whole, part, start):
    there = lax.dynamic_slice_in_dim(whole, start, part.shape[0])
    return lax.dynamic_update_slice_in_dim(whole, there + part, start, 0)


def _sigmoid(values):
    """Relative accuracy in both tails, whatever form the backend gives its logistic."""
    small = jnp.exp(-jnp.abs(values))
    return jnp.where(values >= 0, 1, small) / (1 + small)


def _varying_axes(array) -> frozenset[str]:
    """Mesh axes along which `array` may differ between devices; empty outside `shard_map`."""
    return jax.typeof(array).mat.varying


def _vary_as(pattern, values):
    """`values` (made from constants) marked as varying as `pattern` does: for loop carries."""
    axes = tuple(_varying_axes(pattern))
    return lax.pcast(values, axes, to="varying") if axes else values


def _vary_alike(values):
    """All arrays marked as varying over every mesh axis that one of them varies over."""
    axes = frozenset().union(*map(_varying_axes, jax.tree.leaves(values)))

    def cast(leaf):
        missing = tuple(axes - _varying_axes(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, values)


def _check(contrasts: Sequence[Contrast], labels: Labels):
    first = contrasts[0]
    b, width = first.rows_bD.shape
    shapes_fit = (
        labels.positives_bP.shape[:1] == (b,)
        and labels.positives_bP.ndim == 2
        and labels.row_groups_b.shape == (b,)
    )
    for one in contrasts:
        columns = one.columns_TD.shape[0]
        shapes_fit &= one.rows_bD.shape == (b, width) and one.columns_TD.shape == (columns, width)
        shapes_fit &= one.column_groups_T.shape == (columns,)
        if one.guide is not None:
            rows_bG, columns_TG = one.guide
            shapes_fit &= rows_bG.shape == (b, columns_TG.shape[1]) and len(columns_TG) == columns
    if not shapes_fit:
        raise ValueError(
            f"shapes do not fit: rows and columns "
            f"{[(one.rows_bD.shape, one.columns_TD.shape) for one in contrasts]}, "
            f"labels {[leaf.shape for leaf in labels]}"
        )
    dtypes = {str(array.dtype) for one in contrasts for array in (one.rows_bD, one.columns_TD)}
    if len(dtypes) > 1:
        raise ValueError(f"embeddings are {' and '.join(sorted(dtypes))}: cast one to the other")
    if any(one.guide is not None for one in contrasts) and first.guide is None:
        raise ValueError("a guide of further contrasts needs that of queries and documents")
