"""The layout of rows and slots, against its definition."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcticjax.data import layout


def batch(
    seed: int,
    pairs: int,
    *,
    shared: float = 0.0,
    query_length: int = 32,
    document_length: int = 256,
):
    """Ids and lengths of `pairs` pairs; a share of `shared` of them repeats another's document."""
    random = np.random.default_rng(seed)
    queries = random.permutation(pairs * 3)[:pairs].astype(np.uint64)
    documents = random.permutation(pairs * 3)[:pairs].astype(np.uint64)
    repeat = random.random(pairs) < shared
    documents[repeat] = documents[random.integers(0, pairs, repeat.sum())]
    length_of = {
        d: int(np.clip(random.lognormal(4.4, 0.9), 3, document_length)) for d in documents.tolist()
    }
    document_lengths = np.array([length_of[d] for d in documents.tolist()])
    return queries, documents, random.integers(3, query_length + 1, pairs), document_lengths


@given(st.lists(st.integers(1, 64), max_size=200), st.integers(1, 12))
def test_packing_places_every_text_once_without_overlap(lengths, most):
    rows, starts, slots, used = layout.pack(lengths, 64, most)
    taken: dict[int, list[tuple[int, int, int]]] = {}
    for length, row, start, slot in zip(lengths, rows, starts, slots, strict=True):
        taken.setdefault(int(row), []).append((int(start), int(start) + length, int(slot)))
    assert sorted(taken) == list(range(used))
    for texts in taken.values():
        texts.sort()
        # slots in the order of places
        assert [slot for *_, slot in texts] == list(range(len(texts)))
        assert len(texts) <= most and texts[0][0] == 0 and texts[-1][1] <= 64
        assert all(end == start for (_, end, _), (start, _, _) in itertools.pairwise(texts))


def test_packing_is_tight():
    """Real-looking lengths fill rows to at least 98 %, as best-fit decreasing should."""
    _, _, queries, documents = batch(0, 1024)
    lengths = np.concatenate([queries, documents])
    *_, used = layout.pack(lengths, 256, 32)
    assert lengths.sum() / (used * 256) > 0.98


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"1\.\.65 do not fit rows of 64"):
        layout.pack([1, 65], 64, 8)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    pairs=st.integers(1, 96),
    caps=st.tuples(st.integers(3, 64), st.integers(8, 128)),
    double=st.booleans(),
    rows=st.sampled_from([1, 2, 4]),
    full=st.booleans(),
)
def test_microbatch_bound_holds(seed, pairs, caps, double, rows, full):
    """No batch needs more microbatches than the static shape has: `place` raises if one does."""
    query_cap, document_cap = caps
    longest = layout.round_up(max(caps), 8)
    shapes = layout.Shapes(1, pairs, longest * (2 if double else 1), rows, query_cap, document_cap)
    random = np.random.default_rng(seed)
    queries = np.full(pairs, query_cap) if full else random.integers(2, query_cap + 1, pairs)
    documents = (
        np.full(pairs, document_cap) if full else random.integers(2, document_cap + 1, pairs)
    )
    packing = layout.place(queries, documents, shapes)
    places = packing.places_MGK[packing.places_MGK < shapes.texts]
    assert sorted(places) == list(range(2 * pairs))
    assert packing.lengths_MGK.sum() == queries.sum() + documents.sum()


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_dealing_gives_every_pair_a_device_and_every_document_one_place(devices, shared):
    queries, documents, query_lengths, document_lengths = batch(1, 128, shared=shared)
    dealt = layout.deal(queries, documents, query_lengths, document_lengths, devices)
    room = 128 // devices
    assert sorted(dealt.pairs_Nb.ravel()) == list(range(128))
    held = np.concatenate(dealt.documents)
    assert sorted(documents[held]) == sorted(set(documents.tolist()))  # each id once
    # The label of a pair leads to its own document.
    column_ids = np.zeros(128, np.uint64)
    for device, owned in enumerate(dealt.documents):
        assert set(owned) <= set(
            dealt.pairs_Nb[device]
        )  # one read of a device's pairs brings its documents
        column_ids[device * room : device * room + len(owned)] = documents[owned]
    assert (column_ids[dealt.positives_Nb1[..., 0]] == documents[dealt.pairs_Nb]).all()
    empty = dealt.column_groups_Nb.ravel() == -1
    assert empty.sum() == 128 - len(held)


def test_groups_are_what_pairs_share_transitively():
    #            pairs: (q0,d0) (q1,d0) (q1,d1) (q2,d2) (q3,d1) (q4,d4)
    queries = np.array([0, 1, 1, 2, 3, 4], np.uint64)
    documents = np.array([0, 0, 1, 2, 1, 4], np.uint64)
    dealt = layout.deal(queries, documents, np.full(6, 5), np.full(6, 9), 1)
    group = dict(zip(dealt.pairs_Nb[0].tolist(), dealt.row_groups_Nb[0].tolist(), strict=True))
    assert group[0] == group[1] == group[2] == group[4]
    assert len({group[0], group[3], group[5]}) == 3


@pytest.mark.parametrize("devices, pairs, most", [(8, 64, 0.02), (8, 1000, 0.002), (32, 64, 0.02)])
def test_dealing_balances_tokens(devices, pairs, most):
    queries, documents, query_lengths, document_lengths = batch(2, devices * pairs)
    dealt = layout.deal(queries, documents, query_lengths, document_lengths, devices)
    load = [
        query_lengths[dealt.pairs_Nb[n]].sum() + document_lengths[dealt.documents[n]].sum()
        for n in range(devices)
    ]
    assert max(load) / np.mean(load) - 1 <= most


def test_dealing_refuses_an_uneven_batch():
    with pytest.raises(ValueError, match="7 pairs do not divide among 2"):
        layout.deal(np.arange(7), np.arange(7), np.full(7, 4), np.full(7, 4), 2)


def test_row_length_is_chosen_by_cost():
    """Documents of just over half a row waste half of it, so twice the length pays; short texts
    stay at the cap."""
    long = [np.full(64, 150)]
    short = [np.full(64, 16)]
    assert layout.choose_row_length(long, 256, 384, 1536) == 512
    assert layout.choose_row_length(short, 256, 384, 1536) == 256
    assert layout.choose_row_length(long, 256, 384, 1536, attention_cost=20) == 256


def test_rows_are_chosen_between_waste_and_overhead():
    assert (
        layout.choose_rows([17] * 10, 256, 4096) == 1
    )  # 17 rows: any larger power of two wastes rows
    assert layout.choose_rows([1024] * 10, 256, 4096) == 16  # no waste: as many as memory allows
    assert layout.choose_rows([37] * 10, 256, 32768, 2048) == 40  # a microbatch costs 8 rows


def test_a_batch_takes_the_first_rung_that_holds_it_unless_turns_cost_less():
    shapes = layout.Shapes(1, 64, 32, 4, 8, 32, ladder=(16, 40))
    used = np.array([1, 4, 9, 15, 16, 17, 28, 29, 40, 41])
    fits, rung, rows = shapes.rung(used)
    assert fits.tolist() == [rows in (16, 40) for rows in rows.tolist()]
    # 12 rows in turns cost 1.4 times as much: more than 16 at once. So do 28, and less than 40.
    assert rows.tolist() == [4, 4, 16, 16, 16, 20, 28, 40, 40, 44]
    assert rung[fits].tolist() == [0, 0, 0, 1, 1]
    assert [int(one) for one in shapes.rung(17)] == [0, 1, 20]
    assert [int(one) for one in dataclasses.replace(shapes, ladder=()).rung(17)] == [0, 0, 20]


def test_a_ladder_is_chosen_between_waste_and_turns():
    shapes = layout.Shapes(1, 640, 32, 32, 8, 32)
    alike = [96, 98, 99, 100, 101, 102] * 4
    assert layout.choose_ladder(alike, shapes) == (104,)
    # Two kinds of batches get a rung each.
    assert layout.choose_ladder([*alike, *(2 * rows for rows in alike)], shapes) == (104, 208)
    # Three pairs never fill a multiple of 8 rows.
    few = dataclasses.replace(shapes, pairs=3, rows=1)
    assert layout.choose_ladder([few.room] * 4, few) == (few.room,) == (4,)
    # Of many kinds no two rungs hold enough: one pass in turns wastes less.
    turns = dataclasses.replace(shapes, rows=10)
    assert layout.choose_ladder(range(100, 1000, 50), turns) == ()
