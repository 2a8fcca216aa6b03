"""Matryoshka sizes, further contrasts, margins and guides, against an fp64 reference."""

import re
from functools import cache, partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcticjax.losses import Contrast, Guide, Labels, LossSums, dense_infonce, tiled_infonce
from tests.losses.problems import error, normalise, reference

pytestmark = pytest.mark.usefixtures("quick_compiler")

ROWS, COLUMNS, WIDTH, SLOTS = 11, 19, 12, 2
SIZES = [(12, 0.5), (4, 0.25), (7, 0.3)]


def texts(rng, count, width=WIDTH):
    # What all texts share raises every cosine, as in real embeddings.
    return normalise(rng.normal(size=(count, width)) + 0.5).astype(np.float32)


def make_problem(seed, contrasts=2):
    """Queries, documents, labels, further contrasts and guides; groups repeat, some are empty."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 8, ROWS)
    groups[rng.random(ROWS) < 0.1] = -1
    columns = rng.integers(0, 8, COLUMNS)
    positives = np.full((ROWS, SLOTS), -1)
    for row in range(ROWS):
        chosen = rng.permutation(COLUMNS)[: rng.integers(0, SLOTS + 1)]
        positives[row, : len(chosen)] = chosen
    labels = Labels(*(jnp.asarray(part, jnp.int32) for part in (positives, groups, columns)))
    more = [
        Contrast(
            texts(rng, ROWS),
            texts(rng, count),
            jnp.asarray(rng.integers(-1, 8, count), jnp.int32),
            Guide(texts(rng, ROWS, 5), texts(rng, count, 5)),
        )
        for count in (23, 6)[:contrasts]
    ]
    guide = Guide(texts(rng, ROWS, 5), texts(rng, COLUMNS, 5))
    return texts(rng, ROWS), texts(rng, COLUMNS), labels, more, guide


def gradients(function, queries, documents, labels, *, contrasts, guide, **options):
    """temperature -> ((loss, sums), gradients) of all embeddings and the temperature, compiled."""

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2, 3), has_aux=True)
    def one(queries, documents, pairs, temperature):
        more = [Contrast(*pair, *rest[2:]) for pair, rest in zip(pairs, contrasts, strict=True)]
        sums = function(
            queries,
            documents,
            labels,
            temperature=temperature,
            contrasts=more,
            guide=guide,
            **options,
        )
        return sums.loss, sums

    pairs = [(contrast.rows_bD, contrast.columns_TD) for contrast in contrasts]
    return lambda temperature: one(queries, documents, pairs, jnp.float32(temperature))


OPTIONS = {
    "plain": {},
    "sizes": {"sizes": SIZES},
    "one small size": {"sizes": [(5, 1.0)]},
    "contrasts": {"contrasts": 2},
    "margin": {"margin": -0.05},
    "wide margin": {"margin": 0.1},
    "guide": {"guide": True, "guide_margin": 0.05},
    "everything": {"sizes": SIZES, "contrasts": 2, "margin": 0.1, "guide": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_tiled_and_dense_equal_the_reference(name):
    options = dict(OPTIONS[name])
    *texts, contrasts, guide = make_problem(3, options.pop("contrasts", 0))
    guide = guide if options.pop("guide", False) else None
    if guide is None:
        contrasts = [contrast._replace(guide=None) for contrast in contrasts]
    options |= {"contrasts": contrasts, "guide": guide}
    compiled = [
        gradients(function, *texts, **options)
        for function in (dense_infonce, partial(tiled_infonce, tile=8, row_block=4))
    ]
    for temperature in (0.05, 0.5):
        wanted = reference(*texts, temperature=temperature, **options)
        assert wanted.sums["loss"] > 0.5
        assert wanted.closest > 1e-5  # rounding decides nothing
        for program in compiled:
            (_, sums), found = program(temperature)
            for field in LossSums._fields:
                assert float(getattr(sums, field)) == pytest.approx(
                    wanted.sums[field], rel=1e-5, abs=1e-5
                ), field
            pairs = [
                (found[:2], wanted.gradients),
                *zip(found[2], wanted.contrast_gradients, strict=True),
            ]
            for some, expected in pairs:
                assert error(some[0], expected[0]) <= 1e-5
                assert error(some[1], expected[1]) <= 1e-5
            assert float(found[3]) == pytest.approx(wanted.temperature_gradient, rel=1e-5)


@pytest.mark.parametrize("name", ["contrasts", "margin", "guide", "sizes"])
def test_each_option_changes_the_loss(name):
    """Agreement above would mean nothing for an option that does nothing."""
    queries, documents, labels, contrasts, guide = make_problem(3)
    changed = {
        "contrasts": {"contrasts": [contrast._replace(guide=None) for contrast in contrasts]},
        "margin": {"margin": 0.1},
        "guide": {"guide": guide},
        "sizes": {"sizes": SIZES},
    }[name]
    plain, other = (
        float(dense_infonce(queries, documents, labels, temperature=0.1, **options).loss)
        for options in ({}, changed)
    )
    assert abs(other - plain) > 0.05 * plain


@cache
def tiled_by(tile):
    """(queries, documents, labels, options) -> sums, compiled once for a tile."""

    def sums(queries, documents, labels, options):
        return tiled_infonce(
            queries, documents, labels, tile=tile, row_block=5, sizes=SIZES, margin=0.2, **options
        )

    return jax.jit(sums)


@jax.jit
def whole_matrix(queries, documents, labels, options):
    return dense_infonce(queries, documents, labels, sizes=SIZES, margin=0.2, **options)


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), tile=st.sampled_from([3, 64]))
def test_any_tile(seed, tile):
    queries, documents, labels, contrasts, guide = make_problem(seed)
    options = {
        "temperature": 0.2,
        "contrasts": contrasts,
        "guide": guide,
    }
    found = tiled_by(tile)(queries, documents, labels, options)
    wanted = whole_matrix(queries, documents, labels, options)
    for field in LossSums._fields:
        assert float(getattr(found, field)) == pytest.approx(
            float(getattr(wanted, field)), rel=2e-5, abs=2e-5
        ), field


def test_all_sizes_cost_the_products_of_the_largest():
    """Floating point operations of the compiled loss: sizes add elementwise work only."""
    width, count = 512, 256
    rows = jax.ShapeDtypeStruct((count, width), jnp.float32)
    numbers = jax.ShapeDtypeStruct((count,), jnp.int32)
    labels = Labels(jax.ShapeDtypeStruct((count, 1), jnp.int32), numbers, numbers)

    def products(sizes):
        def loss(queries, documents, labels):
            return tiled_infonce(
                queries, documents, labels, temperature=0.1, tile=count, sizes=sizes
            ).loss

        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(rows, rows, labels).as_text()
        total = 0
        for line in text.splitlines():
            if "dot_general" in line:
                total += multiplications(line)
        return total

    # Scores twice, two gradients; and the positives' own.
    assert products(None) == 4 * count * count * width + count * width
    assert products([(512, 1.0), (256, 1.0), (64, 1.0)]) == products(None)


def multiplications(line: str) -> int:
    """Of a dot_general in StableHLO text: the result's size times what is contracted."""
    left, _, result = (
        [int(number) for number in shape.split("x")]
        for shape in re.findall(r"tensor<([\dx]+)xf32>", line)[-3:]
    )
    (contracted,) = re.findall(r"contracting_dims = \[(\d)\]", line)
    return int(np.prod(result)) * left[int(contracted)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sizes": [(13, 1.0)]}, "between 1 and 12"),
        ({"sizes": [(4, 1.0), (4, 1.0)]}, "distinct"),
        ({"contrasts": 1}, "guide"),
    ],
)
def test_options_that_do_not_fit(options, words):
    queries, documents, labels, contrasts, _ = make_problem(0)
    if "contrasts" in options:
        options = {"contrasts": contrasts}
    with pytest.raises(ValueError, match=words):
        tiled_infonce(queries, documents, labels, temperature=0.1, tile=8, **options)
