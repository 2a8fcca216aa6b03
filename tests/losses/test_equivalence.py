"""The loss part of the equivalence matrix (`equivalence`), and the matrix itself."""

from functools import cache, lru_cache, partial
from itertools import combinations
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from arcticjax.losses import (
    Contrast,
    Guide,
    Labels,
    LossSums,
    candidate_infonce,
    dense_infonce,
    tiled_infonce,
)
from tests.losses import batches, equivalence
from tests.losses.problems import NUMBERS, error, reference

TEMPERATURE, TILE, ROW_BLOCK = 0.2, 7, 5
pytestmark = pytest.mark.usefixtures("quick_compiler")
SIZES = ((batches.WIDTH, 0.5), (9, 0.25), (4, 0.4))
MARGIN = 0.05


@cache
def expected(positives, negatives, texts, mask, sizes, further, dtype, candidates):
    """Means over pairs, and gradients by query and by document, from the one-device layout in fp64
    NumPy."""
    batch = batch_of(positives, negatives, texts)
    layout = batches.lay_out(batch, 1, shared=True)
    queries = jnp.asarray(batch.queries, dtype)
    documents = batches.in_columns(batch.documents, layout, dtype)
    labels = layout.labels
    first = np.asarray(labels.positives_bP)[:, 0]
    contrasts = [
        Contrast(queries, queries, labels.row_groups_b),
        Contrast(documents[first], documents, labels.column_groups_T),
    ]
    guide = Guide(
        jnp.asarray(batch.guide_queries, jnp.float32),
        batches.in_columns(batch.guide_documents, layout),
    )
    found = reference(
        queries,
        documents,
        labels,
        TEMPERATURE,
        sizes=SIZES if sizes == "Matryoshka" else None,
        contrasts=contrasts if further == "yes" else (),
        margin=MARGIN if mask == "margin" else None,
        guide=guide if mask == "guide" else None,
        negatives=layout.negatives_BM if candidates else None,
    )
    query_grad, document_grad = found.gradients
    if further == "yes":
        (rows, columns), (document_rows, document_columns) = found.contrast_gradients
        query_grad = query_grad + rows + columns
        document_grad = document_grad + document_columns
        np.add.at(document_grad, first, document_rows)
    count = found.sums["count"]
    return SimpleNamespace(
        sums=found.sums,
        query_gradient=query_grad / count,
        document_gradient=batches.by_document(document_grad / count, layout, len(batch.documents)),
        temperature_gradient=found.temperature_gradient / count,
        temperature_terms=found.temperature_terms / count,
        closest=found.closest,
    )


@cache
def batch_of(positives, negatives, texts):
    return batches.make_batch(
        11,
        several=positives == "several",
        hard=negatives == "hard",
        repeated=texts == "repeated",
    )


@lru_cache(maxsize=2)
def program(devices, form, mask, sizes, further):
    """Everything inside one shard_map, documents gathered, as the training step does it."""
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    split, whole = P("data"), P()
    gather = partial(jax.lax.all_gather, axis_name="data", tiled=True)
    options = {"sizes": SIZES if sizes == "Matryoshka" else None}
    options["margin"] = MARGIN if mask == "margin" else None

    def total(queries, documents, layout, negatives, guide, temperature):
        if form == "candidates":
            places = layout.positives_bP, negatives
            return candidate_infonce(
                queries, documents, *places, temperature=temperature, **options
            )
        documents, column_groups = gather(documents), gather(layout.column_groups_T)
        further_ones = [
            Contrast(queries, gather(queries), gather(layout.row_groups_b)),
            Contrast(documents[layout.positives_bP[:, 0]], documents, column_groups),
        ]
        function = dense_infonce
        if form == "tiled":
            function = partial(tiled_infonce, tile=TILE, row_block=ROW_BLOCK)
        return function(
            queries,
            documents,
            layout._replace(column_groups_T=column_groups),
            temperature=temperature,
            contrasts=further_ones if further == "yes" else (),
            guide=Guide(guide.rows_bG, gather(guide.columns_TG)) if mask == "guide" else None,
            **options,
        )

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(split, split, split, split, split, whole),
        out_specs=((whole, LossSums(*[whole] * 5)), (split, split, whole)),
    )
    def step(queries, documents, layout, negatives, guide, temperature):
        def mean(queries, documents, temperature):
            sums = total(queries, documents, layout, negatives, guide, temperature)
            sums = jax.lax.psum(sums, "data")
            return sums.loss / sums.count, sums

        return jax.value_and_grad(mean, argnums=(0, 1, 2), has_aux=True)(
            queries, documents, temperature
        )

    return step


def run(cell, layout, batch, labels: Labels | None = None):
    """((mean loss, sums), gradients) of a cell."""
    dtype = jnp.dtype(cell["dtype"])
    step = program(
        int(cell["devices"]), *(cell[axis] for axis in ("form", "mask", "sizes", "further"))
    )
    return step(
        jnp.asarray(batch.queries, dtype),
        batches.in_columns(batch.documents, layout, dtype),
        labels or layout.labels,
        layout.negatives_BM,
        Guide(
            jnp.asarray(batch.guide_queries, jnp.float32),
            batches.in_columns(batch.guide_documents, layout),
        ),
        jnp.float32(TEMPERATURE),
    )


def wanted_of(cell):
    return expected(
        **{name: choice for name, choice in cell.items() if name not in ("devices", "form")},
        candidates=cell["form"] == "candidates",
    )


@equivalence.every_cell(equivalence.LOSS)
def test_cell_equals_the_reference(cell):
    batch = batch_of(cell["positives"], cell["negatives"], cell["texts"])
    layout = batches.lay_out(batch, int(cell["devices"]), shared=cell["form"] != "candidates")
    wanted = wanted_of(cell)
    count = wanted.sums["count"]
    assert 0.1 < wanted.sums["loss"] / count < 10  # of order one: agreement says something
    assert wanted.closest > 1e-5  # no mask hangs on rounding
    (mean, sums), gradients = run(cell, layout, batch)
    exact, coarse = equivalence.TOLERANCES["loss"][cell["dtype"]]
    assert float(mean) == pytest.approx(wanted.sums["loss"] / count, rel=exact)
    for name in NUMBERS:
        assert float(getattr(sums, name)) == pytest.approx(
            wanted.sums[name], rel=exact, abs=exact
        ), name
    by_document = batches.by_document(
        gradients[1].astype(jnp.float32), layout, len(batch.documents)
    )
    assert error(gradients[0].astype(jnp.float32), wanted.query_gradient) <= coarse
    assert error(by_document, wanted.document_gradient) <= coarse
    assert float(gradients[2]) == pytest.approx(
        wanted.temperature_gradient, abs=coarse * wanted.temperature_terms
    )


# What the cells are made of.


def test_hard_negatives_are_shared_between_devices():
    """Of two devices and more: a negative that others name, one that is a positive elsewhere."""
    batch = batch_of("several", "hard", "repeated")
    half = batches.QUERIES // 2
    here, there = (
        {one for row in rows for one in batch.negatives[row]}
        for rows in (range(half), range(half, 2 * half))
    )
    assert here & there
    positives = {one for row in range(half, 2 * half) for one in batch.positives[row]}
    assert here & positives
    assert max(map(len, batch.positives)) == 3
    assert len(set(map(tuple, batch.queries))) < batches.QUERIES


def test_labels_of_another_layout_are_seen():
    """Positions as if all positives came before all negatives: what a gather of each device's
    positives and negatives does not give."""
    cell = {"devices": "2", "form": "dense", "dtype": "float32", "positives": "several"}
    cell |= {"negatives": "hard", "texts": "distinct", "mask": "none", "sizes": "whole"}
    cell |= {"further": "no"}
    batch = batch_of(cell["positives"], cell["negatives"], cell["texts"])
    layout = batches.lay_out(batch, 2, shared=True)
    own = {one for part in batch.positives for one in part}
    order = np.argsort([one not in own for one in layout.documents], kind="stable")
    moved = np.append(np.argsort(order), -1)[np.asarray(layout.labels.positives_bP)]
    labels = layout.labels._replace(positives_bP=jnp.asarray(moved, jnp.int32))
    (mean, _), _ = run(cell, layout, batch, labels)
    wanted = wanted_of(cell).sums
    assert abs(float(mean) - wanted["loss"] / wanted["count"]) > 0.1


@pytest.mark.parametrize("axis", ["positives", "negatives", "texts", "mask", "sizes", "further"])
def test_every_choice_changes_the_loss(axis):
    """Agreement would mean nothing for an axis that changes nothing."""
    cell = {name: choices[-1] for name, choices in equivalence.LOSS.axes.items()}
    cell |= {"form": "tiled", "dtype": "float32", "mask": "none"}
    losses = []
    for choice in equivalence.LOSS.axes[axis]:
        wanted = wanted_of({**cell, axis: choice}).sums
        losses.append(wanted["loss"] / wanted["count"])
    assert all(abs(one - other) > 1e-3 for one, other in combinations(losses, 2))


# The matrix.


@pytest.mark.parametrize("part", equivalence.MATRICES)
def test_the_slice_covers_every_pair(part):
    matrix = equivalence.MATRICES[part]
    cells, chosen = matrix.cells(), matrix.slice()
    assert all(cell in cells for cell in chosen)
    assert chosen == matrix.slice()
    for (one, ones), (other, others) in combinations(matrix.axes.items(), 2):
        for first in ones:
            for second in others:
                meets = [cell for cell in cells if (cell[one], cell[other]) == (first, second)]
                tried = [cell for cell in chosen if (cell[one], cell[other]) == (first, second)]
                left_out = matrix.on_demand & {(one, first), (other, second)}
                assert (bool(meets) and not left_out) == bool(tried), (first, second)


def test_the_slice_is_small():
    total = sum(len(matrix.slice()) for matrix in equivalence.MATRICES.values())
    assert total <= equivalence.MOST_CELLS


def test_the_page_says_what_is_tested():
    assert equivalence.PAGE.read_text() == equivalence.page(), (
        "run python -m tests.losses.equivalence"
    )
