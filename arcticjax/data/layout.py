"""From drawn pairs to rows and slots: which device encodes which text, and where in which row.

A global batch of B pairs is dealt to N devices, b = B/N pairs each. A document needed by several
pairs is encoded once, by the device of the first of them. Each device packs its queries and
documents together into rows of S tokens, at most K = S/8 texts a row, and its rows into
microbatches of G rows. All of this is a pure function of the draw and the texts' lengths and ids,
so that every process computes the same and reads only its own records.

Axis letters: N devices, b pairs a device, T texts a device (b queries, then up to b documents),
M microbatches, G rows of a microbatch, S row length, K slots of a row.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

# A text of fewer tokens than this still takes this share of a row's slots: [CLS], a few words,
# [SEP].
TOKENS_PER_SLOT = 8
# What a row that is encoded in turns costs over one of a rung, which is encoded at once: with two
# passes a third more computing, with one the copies of activations (an H200 traced).
IN_TURN_COST = {"two": 1.4, "one": 1.2}


@dataclass(frozen=True)
class Shapes:
    """Static shapes of a training step; one compiled program serves every batch of a run.

    devices: N; pairs: b, queries of a device; row_length: S; rows: G; query_length,
    document_length: caps with special tokens and prompt; positives, negatives: documents that a
    query brings at most. ladder: ascending numbers of rows; a batch that needs no more on any
    device is encoded at once, in so many, instead of in microbatches.
    """

    devices: int
    pairs: int
    row_length: int
    rows: int
    query_length: int
    document_length: int
    positives: int = 1
    negatives: int = 0
    ladder: tuple[int, ...] = ()

    @property
    def slots(self) -> int:
        """K, the most texts that a row holds."""
        return self.row_length // TOKENS_PER_SLOT

    @property
    def documents(self) -> int:
        """Room for documents on a device."""
        return self.pairs * (self.positives + self.negatives)

    @property
    def texts(self) -> int:
        """T: queries and documents of a device."""
        return self.pairs + self.documents

    @property
    def microbatches(self) -> int:
        """M, the most microbatches that a device can need, whatever the lengths.

        Best-fit decreasing never opens a row while an open one has room. So (1) counting the rows
        that documents open, at most one each, and those that queries open, each of which but the
        last holds as many queries as fit; or (2) every row but the last holds at least
        S // longest texts. The smaller bound holds.
        """
        longest = max(self.query_length, self.document_length)
        queries_per_row = min(self.row_length // self.query_length, self.slots)
        texts_per_row = min(self.row_length // longest, self.slots)
        one = self.documents + -(-self.pairs // queries_per_row)
        two = -(-self.texts // texts_per_row) + 1
        return -(-min(one, two) // self.rows)

    @property
    def room(self) -> int:
        """Rows of all microbatches."""
        return self.microbatches * self.rows

    def rung(self, used: Any) -> tuple[Any, Any, Any]:
        """For the rows in use on the fullest device, one number or an array, also of jax: whether
        a rung of the ladder encodes them, the first that can hold them (the last, if none can), and
        how many rows are encoded then: those of the rung, else those of the microbatches."""
        in_turn = -(-used // self.rows) * self.rows
        if not self.ladder:
            return used < 0, 0 * used, in_turn
        rung = sum((used > rows) * 1 for rows in self.ladder[:-1]) + 0 * used
        rows = self.ladder[0] + sum(
            (used > one) * (other - one) for one, other in itertools.pairwise(self.ladder)
        )
        fits = (used <= self.ladder[-1]) & (rows <= in_turn * IN_TURN_COST["two"])
        return fits, rung, fits * rows + (1 - fits) * in_turn


@dataclass(frozen=True)
class Deal:
    """Which device has which pairs and documents; the same on every process.

    pairs_Nb: index into the draw of each device's pairs.
    documents: per device, index into the draw of the pair whose record holds each document it
        encodes.
    positives_Nb1: column of each pair's document among the gathered N * b document places.
    row_groups_Nb, column_groups_Nb: pairs that share a query or document id, transitively, are of
        one group: related texts are never each other's negatives. -1 marks an empty document
        place.
    """

    pairs_Nb: np.ndarray
    documents: list[np.ndarray]
    positives_Nb1: np.ndarray
    row_groups_Nb: np.ndarray
    column_groups_Nb: np.ndarray

    def arrays(self) -> list[np.ndarray]:
        """All of it, to compare with what another process has."""
        return [
            self.pairs_Nb,
            *self.documents,
            self.positives_Nb1,
            self.row_groups_Nb,
            self.column_groups_Nb,
        ]


@dataclass(frozen=True)
class Packing:
    """One device's rows: for each slot the text's start and length in its row and its place among
    the T texts.

    Empty slots have start S, length 0 and place T. `rows` counts the rows in use.
    """

    starts_MGK: np.ndarray
    lengths_MGK: np.ndarray
    places_MGK: np.ndarray
    rows: int


def pack(
    lengths: Sequence[int] | np.ndarray, row_length: int, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Packs texts into rows by best-fit decreasing.

    Returns for each text its row, start and slot in the row, and the number of rows. At most `most`
    texts share a row. Every length must be in 1..row_length.
    """
    lengths = np.asarray(lengths, np.int64)
    total = len(lengths)
    rows = np.empty(total, np.int64)
    starts = np.empty(total, np.int64)
    slots = np.empty(total, np.int64)
    if total == 0:
        return rows, starts, slots, 0
    if lengths.min() < 1 or lengths.max() > row_length:
        raise ValueError(
            f"text lengths {lengths.min()}..{lengths.max()} do not fit rows of {row_length}"
        )
    order = np.argsort(-lengths, kind="stable")
    # by_room[r]: rows with r free tokens and a free slot; bit r of `rooms` tells whether there is
    # one.
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0
    counts: list[int] = []
    row_list, start_list, slot_list = [0] * total, [0] * total, [0] * total
    for place, length in enumerate(lengths[order].tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            stack = by_room[room]
            row = stack.pop()
            if not stack:
                rooms &= ~(1 << room)
        else:
            room, row = row_length, len(counts)
            counts.append(0)
        row_list[place], start_list[place], slot_list[place] = row, row_length - room, counts[row]
        counts[row] += 1
        left = room - length
        if left and counts[row] < most:
            by_room[left].append(row)
            rooms |= 1 << left
    rows[order], starts[order], slots[order] = row_list, start_list, slot_list
    return rows, starts, slots, len(counts)


def deal(
    query_ids_B: np.ndarray,
    document_ids_B: np.ndarray,
    query_lengths_B: np.ndarray,
    document_lengths_B: np.ndarray,
    devices: int,
) -> Deal:
    """Deals pairs to devices, longest first, each to the lightest device that has room.

    Lengths count tokens as encoded. Raises ValueError where B is not a multiple of `devices`.
    """
    total = len(query_ids_B)
    if total % devices:
        raise ValueError(f"{total} pairs do not divide among {devices} devices")
    room = total // devices
    _, first, unique_B = np.unique(document_ids_B, return_index=True, return_inverse=True)
    owner_B = first[unique_B]  # the pair whose device encodes the document
    owns_B = owner_B == np.arange(total)
    device_B = lightest_first(query_lengths_B + document_lengths_B * owns_B, devices, room)

    order = np.argsort(device_B, kind="stable")
    pairs_Nb = order.reshape(devices, room)
    groups_B = _groups(query_ids_B, unique_B)

    documents: list[np.ndarray] = []
    column_of_owner = np.full(total, -1, np.int64)
    column_groups_Nb = np.full((devices, room), -1, np.int32)
    for device, pairs_b in enumerate(pairs_Nb):
        owned = pairs_b[owns_B[pairs_b]]
        documents.append(owned)
        column_of_owner[owned] = device * room + np.arange(len(owned))
        column_groups_Nb[device, : len(owned)] = groups_B[owned]
    return Deal(
        pairs_Nb=pairs_Nb,
        documents=documents,
        positives_Nb1=column_of_owner[owner_B[pairs_Nb]].astype(np.int32)[..., None],
        row_groups_Nb=groups_B[pairs_Nb],
        column_groups_Nb=column_groups_Nb,
    )


def place(query_lengths_b: np.ndarray, document_lengths: np.ndarray, shapes: Shapes) -> Packing:
    """Packs one device's texts: b queries take places 0..b-1, its documents places b and up."""
    room = shapes.room
    rows, starts, slots, used = pack(
        np.concatenate([query_lengths_b, document_lengths]), shapes.row_length, shapes.slots
    )
    if used > room:
        raise AssertionError(f"{used} rows exceed the bound of {room}: {shapes}")
    shape = (room, shapes.slots)
    starts_RK = np.full(shape, shapes.row_length, np.int32)
    lengths_RK = np.zeros(shape, np.int32)
    places_RK = np.full(shape, shapes.texts, np.int32)
    starts_RK[rows, slots] = starts
    lengths_RK[rows, slots] = np.concatenate([query_lengths_b, document_lengths])
    places_RK[rows, slots] = np.arange(len(rows))
    full = (shapes.microbatches, shapes.rows, shapes.slots)
    return Packing(starts_RK.reshape(full), lengths_RK.reshape(full), places_RK.reshape(full), used)


def choose_row_length(
    samples: Iterable[np.ndarray],
    longest: int,
    hidden_size: int,
    intermediate_size: int,
    attention_cost: float = 1.0,
) -> int:
    """The cheaper row length, the longest cap or twice it, for sampled batches (arrays of text
    lengths).

    Cost of a token forward, in multiply-adds a layer: 4 h^2 + 2 h f for the matrices and 2 S h for
    attention, which spans the whole row; each row's unused tokens cost as much as used ones.
    `attention_cost` is what a multiply-add of attention takes over one of the matrices.
    """
    samples = list(samples)
    base = round_up(longest, TOKENS_PER_SLOT)

    def cost(row_length: int) -> float:
        rows = sum(
            pack(lengths, row_length, row_length // TOKENS_PER_SLOT)[3] for lengths in samples
        )
        matrices = 4 * hidden_size**2 + 2 * hidden_size * intermediate_size
        attention = attention_cost * 2 * row_length * hidden_size
        return rows * row_length * (matrices + attention)

    return min((base, 2 * base), key=cost)


def choose_rows(
    row_counts: Sequence[int], row_length: int, most_tokens: int, overhead_tokens: int = 16
) -> int:
    """Rows of a microbatch, a power of two up to 8 and else a multiple of it: what costs the fewest
    token slots over sampled row counts.

    A microbatch costs its slots and a fixed part worth `overhead_tokens` (accumulating the
    gradient, loop control); `most_tokens` bounds its activations' memory.
    """
    most = max(1, most_tokens // row_length)
    choices = [rows for rows in (1, 2, 4, *range(8, most + 1, 8)) if rows <= most]

    def cost(rows: int) -> int:
        return sum(
            -(-count // rows) * (rows * row_length + overhead_tokens) for count in row_counts
        )

    return min(choices, key=cost)


def choose_ladder(row_counts: Sequence[int], shapes: Shapes, most: int = 2) -> tuple[int, ...]:
    """At most so many rungs, multiples of 8 rows or all that a device can fill, that cost least
    over sampled row counts; none where one pass in microbatches costs less. A further rung compiles
    a further program, so it must save 2 %."""
    # Batches that were not sampled are a little larger or smaller.
    counts = np.outer(row_counts, (0.98, 1.0, 1.02)).round().astype(np.int64).reshape(-1)
    candidates = sorted({min(round_up(int(count), 8), shapes.room) for count in counts})

    def cost(ladder: tuple[int, ...]) -> float:
        fits, _, rows = replace(shapes, ladder=ladder).rung(counts)
        in_turn = IN_TURN_COST["two" if ladder else "one"]
        return float((rows * np.where(fits, 1.0, in_turn)).sum())

    best: tuple[int, ...] = ()
    for rungs in range(1, most + 1):
        found = min(itertools.combinations(candidates, rungs), key=cost, default=best)
        if cost(found) < 0.98 * cost(best):
            best = found
    return best


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple


def lightest_first(weights_B: np.ndarray, devices: int, room: int) -> np.ndarray:
    """The device of each pair, by longest-processing-time-first with `room` pairs a device."""
    total = len(weights_B)
    if devices == 1:
        return np.zeros(total, np.int64)
    device_B = np.empty(total, np.int64)
    order = np.argsort(-np.asarray(weights_B, np.int64), kind="stable")
    weights = np.asarray(weights_B, np.int64)[order].tolist()
    heap = [(0, 0, device) for device in range(devices)]  # load, pairs, device
    chosen = [0] * total
    for position, weight in enumerate(weights):
        load, pairs, device = heapq.heappop(heap)
        chosen[position] = device
        if pairs + 1 < room:
            heapq.heappush(heap, (load + weight, pairs + 1, device))
    device_B[order] = chosen
    return device_B


def _groups(query_ids_B: np.ndarray, documents_B: np.ndarray) -> np.ndarray:
    """Connected components of the graph whose edges are the batch's pairs, numbered from 0."""
    _, queries_B = np.unique(query_ids_B, return_inverse=True)
    queries, documents = queries_B.max() + 1, documents_B.max() + 1
    if queries == len(queries_B) or documents == len(documents_B):
        # One side has no repeats: a component is a star around the other side's text.
        return (documents_B if queries == len(queries_B) else queries_B).astype(np.int32)
    edges = sparse.coo_array(
        (np.ones(len(queries_B), np.int8), (queries_B, queries + documents_B)),
        shape=(queries + documents, queries + documents),
    )
    return csgraph.connected_components(edges, directed=False)[1][queries_B].astype(np.int32)
