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

Equivalence. Any tile size, row block, order of columns and division of rows over devices gives the
same sums and gradients up to fp32 rounding: a term needs its own row and all documents, and nothing
of other rows. On several devices, with documents gathered by `all_gather(..., tiled=True)` inside
`shard_map(check_vma=True)`, the gradient of `psum(loss) / psum(count)` is the one-device gradient:
the gather's transpose (a reduce-scatter) adds what each device owes to a document.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from arcticjax.losses.labels import Labels, LossSums

# Scores held at once (8 MiB in fp32): rows are taken in blocks of this over `tile`.
SCORES_AT_ONCE = 2**21
# Below every score, and finite, so that differences of it are numbers.
FLOOR = -1e30


def tiled_infonce(
    queries_bD: jax.Array,
    documents_TD: jax.Array,
    labels: Labels,
    *,
    temperature: float | jax.Array,
    tile: int,
    row_block: int | None = None,
) -> LossSums:
    """InfoNCE sums of this device's queries against all documents, `tile` columns at a time.

    Both inputs are L2-normalised and of one dtype. `tile` need not divide T and may exceed it.
    `row_block` rows are scored at once (None: as many as keep a tile within `SCORES_AT_ONCE`).
    Scores, logsumexp and gradient sums are fp32. fp32 inputs are multiplied at full precision on
    every backend (a TPU would otherwise round them to bf16); bf16 inputs are multiplied as bf16
    with fp32 accumulation, softmax weights rounded to bf16 in the backward pass: the caller chooses
    by casting. Gradients flow to queries, documents and `temperature`; no second derivatives.
    Scores are recomputed in the backward pass. No scatter is used, so results are deterministic.

    Raises ValueError when shapes or dtypes do not fit each other.
    """
    _check(queries_bD, documents_TD, labels)
    if tile < 1 or (row_block is not None and row_block < 1):
        raise ValueError(f"tile and row_block must be at least 1, got {tile} and {row_block}")
    tile = min(tile, documents_TD.shape[0])
    rows = min(row_block or max(1, SCORES_AT_ONCE // tile), queries_bD.shape[0])
    temperature = jnp.asarray(temperature, jnp.float32)
    # One varying type for all, so that the rules below need no care for devices; where something
    # replicated comes in, the transpose of this cast adds the devices' gradients.
    queries_bD, documents_TD, temperature, labels = _vary_alike(
        (queries_bD, documents_TD, temperature, labels)
    )
    return _tiled(queries_bD, documents_TD, temperature, labels, tile, rows)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _tiled(queries_bD, documents_TD, temperature, labels: Labels, tile: int, rows: int) -> LossSums:
    return _forward(queries_bD, documents_TD, temperature, labels, tile, rows)[0]


def _forward(queries_bD, documents_TD, temperature, labels: Labels, tile: int, rows: int):
    largest_b, total_b, positive_bP = _row_statistics(
        queries_bD, documents_TD, temperature, labels, tile, rows
    )
    valid_bP = (labels.positives_bP >= 0) & (labels.row_groups_b >= 0)[:, None]
    contested_b = total_b != 0  # also true of NaN, which must reach the loss
    # FLOOR where a row has no negatives: its terms and their gradients come out as exactly 0.
    negatives_b = largest_b + jnp.log(jnp.where(contested_b, total_b, 1))
    gap_bP = negatives_b[:, None] - positive_bP
    term_bP = jnp.maximum(gap_bP, 0) + jnp.log1p(jnp.exp(-jnp.abs(gap_bP)))
    correct_bP = positive_bP > largest_b[:, None]
    hardest_bP = jnp.where(contested_b, largest_b, 0)[:, None] * jnp.ones_like(positive_bP)

    def total(values_bP):
        return jnp.sum(jnp.where(valid_bP, values_bP, 0), dtype=jnp.float32)

    sums = LossSums(
        loss=total(term_bP),
        count=total(jnp.ones_like(positive_bP)),
        correct=total(correct_bP.astype(jnp.float32)),
        positive_score=total(positive_bP) * temperature,
        hardest_negative_score=total(hardest_bP) * temperature,
    )
    weights_bP = jnp.where(valid_bP, _sigmoid(gap_bP), 0)
    return sums, (queries_bD, documents_TD, temperature, labels, negatives_b, weights_bP)


def _backward(tile: int, rows: int, residuals, cotangents: LossSums):
    queries_bD, documents_TD, temperature, labels, negatives_b, weights_bP = residuals
    # score = cosine / temperature: its derivative goes into b * P numbers instead of b * T.
    weights_bP = weights_bP * (cotangents.loss / temperature)
    queries_grad_bD, documents_grad_TD = _gradients(
        queries_bD, documents_TD, temperature, labels, negatives_b, weights_bP, tile, rows
    )
    # The gradient is -1/temperature times the sum of s_ij * d loss / d s_ij, which is the product
    # of the queries with their own gradient.
    temperature_grad = -jnp.sum(queries_bD.astype(jnp.float32) * queries_grad_bD) / temperature
    return (
        queries_grad_bD.astype(queries_bD.dtype),
        documents_grad_TD.astype(documents_TD.dtype),
        temperature_grad,
        None,
    )


_tiled.defvjp(_forward, _backward)


def _row_statistics(queries_bD, documents_TD, temperature, labels: Labels, tile: int, rows: int):
    """Largest negative score of a row, sum of exp(negative - largest), and its positives' scores.

    Online logsumexp: a tile with a larger maximum rescales the sum so far. A row without negatives
    keeps (FLOOR, 0).
    """
    b, slots = labels.positives_bP.shape
    columns = documents_TD.shape[0]

    def row_step(block, carry):
        start, _ = _block(block, rows, b)
        queries_rD = lax.dynamic_slice_in_dim(queries_bD, start, rows)
        positives_rP = lax.dynamic_slice_in_dim(labels.positives_bP, start, rows)
        groups_r = lax.dynamic_slice_in_dim(labels.row_groups_b, start, rows)

        def tile_step(index, statistics):
            largest_r, total_r = statistics
            first, fresh_t = _block(index, tile, columns)
            documents_tD = lax.dynamic_slice_in_dim(documents_TD, first, tile)
            groups_t = lax.dynamic_slice_in_dim(labels.column_groups_T, first, tile)
            scores_rt, _ = _tile_scores(
                queries_rD,
                documents_tD,
                temperature,
                groups_r,
                groups_t,
                positives_rP,
                first,
                fresh_t,
            )
            larger_r = jnp.maximum(largest_r, jnp.max(scores_rt, axis=1))
            fresh_total_r = jnp.sum(jnp.exp(scores_rt - larger_r[:, None]), axis=1)
            return larger_r, total_r * jnp.exp(largest_r - larger_r) + fresh_total_r

        empty = _vary_as(
            queries_bD, (jnp.full(rows, FLOOR, jnp.float32), jnp.zeros(rows, jnp.float32))
        )
        largest_r, total_r = lax.fori_loop(0, _count(columns, tile), tile_step, empty)
        positive_rP = _positive_scores(queries_rD, documents_TD, positives_rP, temperature)
        return tuple(
            lax.dynamic_update_slice_in_dim(whole, part, start, 0)
            for whole, part in zip(carry, (largest_r, total_r, positive_rP), strict=True)
        )

    start = _vary_as(
        queries_bD, tuple(jnp.zeros(shape, jnp.float32) for shape in ((b,), (b,), (b, slots)))
    )
    return lax.fori_loop(0, _count(b, rows), row_step, start)


def _gradients(
    queries_bD,
    documents_TD,
    temperature,
    labels: Labels,
    negatives_b,
    weights_bP,
    tile: int,
    rows: int,
):
    """fp32 gradients of queries and documents; each tile of scores serves both."""
    b, width = queries_bD.shape
    columns = documents_TD.shape[0]

    def tile_step(index, carry):
        first, fresh_t = _block(index, tile, columns)
        documents_tD = lax.dynamic_slice_in_dim(documents_TD, first, tile)
        groups_t = lax.dynamic_slice_in_dim(labels.column_groups_T, first, tile)

        def row_step(block, carry):
            queries_grad_bD, documents_grad_tD = carry
            start, fresh_r = _block(block, rows, b)
            queries_rD, positives_rP, groups_r, negatives_r, weights_rP = (
                lax.dynamic_slice_in_dim(whole, start, rows)
                for whole in (
                    queries_bD,
                    labels.positives_bP,
                    labels.row_groups_b,
                    negatives_b,
                    weights_bP,
                )
            )
            if fresh_r is not None:
                weights_rP = jnp.where(fresh_r[:, None], weights_rP, 0)
            scores_rt, hits_Prt = _tile_scores(
                queries_rD,
                documents_tD,
                temperature,
                groups_r,
                groups_t,
                positives_rP,
                first,
                fresh_t,
            )
            grad_rt = jnp.sum(weights_rP, axis=1)[:, None] * jnp.exp(
                scores_rt - negatives_r[:, None]
            )
            for slot, hits_rt in enumerate(hits_Prt):
                grad_rt = jnp.where(hits_rt, grad_rt - weights_rP[:, slot, None], grad_rt)
            grad_rt = grad_rt.astype(queries_bD.dtype)
            part_rD = lax.dynamic_slice_in_dim(queries_grad_bD, start, rows)
            part_rD = part_rD + _matmul(grad_rt, documents_tD, ((1,), (0,)))
            documents_grad_tD = documents_grad_tD + _matmul(grad_rt, queries_rD, ((0,), (0,)))
            return (
                lax.dynamic_update_slice_in_dim(queries_grad_bD, part_rD, start, 0),
                documents_grad_tD,
            )

        queries_grad_bD, documents_grad_TD = carry
        # The last tile may lie over the one before: it adds to what is there.
        part_tD = lax.dynamic_slice_in_dim(documents_grad_TD, first, tile)
        queries_grad_bD, part_tD = lax.fori_loop(
            0, _count(b, rows), row_step, (queries_grad_bD, part_tD)
        )
        return queries_grad_bD, lax.dynamic_update_slice_in_dim(
            documents_grad_TD, part_tD, first, 0
        )

    start = _vary_as(
        queries_bD,
        (jnp.zeros((b, width), jnp.float32), jnp.zeros((columns, width), jnp.float32)),
    )
    return lax.fori_loop(0, _count(columns, tile), tile_step, start)


def _tile_scores(
    queries_rD, documents_tD, temperature, groups_r, groups_t, positives_rP, first, fresh_t
):
    """Scores, -inf where a column is no negative of the row; and where each positive of it is."""
    scores_rt = _matmul(queries_rD, documents_tD, ((1,), (1,))) / temperature
    columns_t = first + lax.iota(jnp.int32, documents_tD.shape[0])
    real_t = groups_t >= 0
    if fresh_t is not None:
        real_t = real_t & fresh_t
        columns_t = jnp.where(fresh_t, columns_t, -2)  # no positive's number, not even "none"
    negative_rt = real_t[None, :] & (groups_t[None, :] != groups_r[:, None])
    hits_Prt = []
    for slot in range(positives_rP.shape[1]):
        hits_rt = columns_t[None, :] == positives_rP[:, slot, None]
        negative_rt = negative_rt & ~hits_rt
        hits_Prt.append(hits_rt)
    return jnp.where(negative_rt, scores_rt, -jnp.inf), hits_Prt


def _positive_scores(queries_rD, documents_TD, positives_rP, temperature):
    """Scores of the positives; of column 0 where there is none (masked by the caller)."""
    scores = []
    for slot in range(positives_rP.shape[1]):  # one slot at a time: r * D numbers, not r * P * D
        documents_rD = jnp.take(documents_TD, jnp.maximum(positives_rP[:, slot], 0), axis=0)
        scores.append(
            jnp.einsum(
                "rd,rd->r",
                queries_rD,
                documents_rD,
                precision=_precision(queries_rD),
                preferred_element_type=jnp.float32,
            )
        )
    return jnp.stack(scores, axis=1) / temperature


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


def _sigmoid(values):
    """Relative accuracy in both tails, whatever form the backend gives its logistic."""
    small = jnp.exp(-jnp.abs(values))
    return jnp.where(values >= 0, 1, small) / (1 + small)


def _count(length: int, block: int) -> int:
    return -(-length // block)


def _block(index, block: int, length: int):
    """Start of a block, moved back to end within `length`, and which places no earlier block had.

    The second is None when blocks divide the length.
    """
    wanted = index * block
    if length % block == 0:
        return wanted, None
    start = jnp.minimum(wanted, length - block)
    return start, start + lax.iota(jnp.int32, block) >= wanted


def _varying_axes(array) -> frozenset[str]:
    """Mesh axes along which `array` may differ between devices; empty outside `shard_map`."""
    return jax.typeof(array).mat.varying


def _vary_as(pattern, values):
    """`values` (made from constants) marked as varying as `pattern` does: for loop carries."""
    axes = tuple(_varying_axes(pattern))
    return lax.pcast(values, axes, to="varying") if axes else values


def _vary_alike(values: tuple) -> tuple:
    """All arrays marked as varying over every mesh axis that one of them varies over."""
    axes = frozenset().union(*map(_varying_axes, jax.tree.leaves(values)))

    def cast(leaf):
        missing = tuple(axes - _varying_axes(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, values)


def _check(queries_bD, documents_TD, labels: Labels) -> None:
    b, width = queries_bD.shape
    shapes_fit = (
        documents_TD.shape[1:] == (width,)
        and labels.positives_bP.shape[:1] == (b,)
        and labels.positives_bP.ndim == 2
        and labels.row_groups_b.shape == (b,)
        and labels.column_groups_T.shape == documents_TD.shape[:1]
    )
    if not shapes_fit:
        raise ValueError(
            f"shapes do not fit: queries {queries_bD.shape}, documents {documents_TD.shape}, "
            f"labels {[leaf.shape for leaf in labels]}"
        )
    if queries_bD.dtype != documents_TD.dtype:
        raise ValueError(
            f"queries are {queries_bD.dtype}, documents {documents_TD.dtype}: cast one to the other"
        )
