"""The input pipeline: step -> draw -> layout -> records -> rows.

It runs in Grain's worker threads and resumes by the step alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import grain.python as grain
import numpy as np

from arcticjax import errors
from arcticjax.data import assemble, layout, list_layout
from arcticjax.data.catalog import SourceView
from arcticjax.data.draw import Draw, Drawn

_SAMPLES = 24  # batches from whose lengths shapes are chosen


@dataclass(frozen=True)
class HostBatch:
    """This process's part of a global batch.

    arrays: for the step, axis 0 = local devices n:
        tokens [n, M, G, S], starts, lengths, places [n, M, G, K], positives [n, b, 1],
        row_groups [n, b], column_groups [n, b]; all int32. With lists (see `list_pipeline`):
        positives [n, b, P], groups only where documents are shared, else or for distillation
        negatives [n, b, M], and for distillation teacher [n, b, P + M], float32.
    step, source (its name), drawn, dealt: where the batch comes from, and which device has what of
    it; the same on every process.
    """

    arrays: dict[str, np.ndarray]
    step: int
    source: str
    drawn: Drawn
    dealt: layout.Deal | list_layout.ListDeal

    @property
    def rows(self) -> int:
        """Rows in use on the fullest of these devices; a device fills its rows in order."""
        return int(self.arrays["lengths"].any(-1).sum((1, 2)).max())


@dataclass(frozen=True)
class BatchBuilder:
    """Builds the batch of any step; a pure function of (step, sources, seed), whatever was built
    before.

    local: positions of this process's devices along the batch's first axis.
    """

    views: Sequence[SourceView]
    draw: Draw
    shapes: layout.Shapes
    query: assemble.Template
    document: assemble.Template
    local: Sequence[int]
    pad_id: int = 0

    def __call__(self, step: int) -> HostBatch:
        drawn = self.draw.at(int(step))
        view = self.views[drawn.source]
        records = drawn.records
        query_lengths = self.query.lengths(view.query_lengths(records))
        document_lengths = self.document.lengths(view.document_lengths(records))
        dealt = layout.deal(
            view.query_ids(records),
            view.document_ids(records),
            query_lengths,
            document_lengths,
            self.shapes.devices,
        )
        local = list(self.local)
        # One read for all devices of the process: a read has a fixed cost of some 200 records. A
        # device's documents are documents of its own pairs, so it brings both sides.
        pairs = dealt.pairs_Nb[local]
        queries, bodies = view.read(records[pairs.reshape(-1)])
        parts = []
        for place, device in enumerate(local):
            own = slice(place * self.shapes.pairs, (place + 1) * self.shapes.pairs)
            documents = dealt.documents[device]
            body_of_pair = dict(zip(pairs[place].tolist(), bodies[own], strict=True))
            parts.append(
                device_rows(
                    self.shapes,
                    (self.query, self.document),
                    self.pad_id,
                    (queries[own], [body_of_pair[pair] for pair in documents.tolist()]),
                    (query_lengths[pairs[place]], document_lengths[documents]),
                )
            )
        arrays = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        arrays |= {
            "positives": dealt.positives_Nb1[local],
            "row_groups": dealt.row_groups_Nb[local],
            "column_groups": dealt.column_groups_Nb[local],
        }
        return HostBatch(arrays, int(step), view.name, drawn, dealt)


def device_rows(
    shapes: layout.Shapes,
    templates: tuple[assemble.Template, assemble.Template],
    pad_id: int,
    texts: tuple[list[np.ndarray], list[np.ndarray]],
    lengths: tuple[np.ndarray, np.ndarray],
) -> dict[str, np.ndarray]:
    """One device's rows, from the tokens of its queries and documents, and their lengths as
    encoded; every argument in that order."""
    queries, bodies = texts
    packing = layout.place(*lengths, shapes)
    rows = shapes.room
    tokens = np.full((rows, shapes.row_length), pad_id, np.int32)
    used = packing.places_MGK < shapes.texts
    row_of = np.broadcast_to(np.arange(rows)[:, None], (rows, shapes.slots)).reshape(used.shape)
    position_T = np.empty(len(queries) + len(bodies), np.int64)
    position_T[packing.places_MGK[used]] = (
        row_of[used] * shapes.row_length + packing.starts_MGK[used]
    )
    assemble.fill_rows(tokens, queries, position_T[: len(queries)], templates[0])
    assemble.fill_rows(tokens, bodies, position_T[len(queries) :], templates[1])
    return {
        "tokens": tokens.reshape(shapes.microbatches, shapes.rows, shapes.row_length),
        "starts": packing.starts_MGK,
        "lengths": packing.lengths_MGK,
        "places": packing.places_MGK,
    }


def batches(
    builder: Callable[[int], HostBatch], start: int, stop: int, *, threads: int, prefetch: int
) -> Iterator[HostBatch]:
    """Batches of steps start..stop-1, built ahead by `threads` Grain threads, `prefetch` batches
    deep.

    The order and content of batches depend on the step alone, so resuming needs nothing but
    `start`.
    """
    steps: Any = grain.MapDataset.range(start, stop).map(builder)
    return iter(
        steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))
    )


def choose_shapes(
    views: Sequence[SourceView],
    draw: Draw,
    query: assemble.Template,
    document: assemble.Template,
    *,
    devices: int,
    row_length: int | None,
    rows: int | None,
    hidden_size: int,
    intermediate_size: int,
    most_tokens: int,
    overhead_tokens: int = 16,
    attention_cost: float = 1.0,
) -> layout.Shapes:
    """The shapes of a run on pairs; see `shapes_for`."""
    return shapes_for(
        sample_lengths(views, draw, query, document, devices),
        query,
        document,
        devices=devices,
        pairs=draw.global_batch // devices,
        row_length=row_length,
        rows=rows,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        most_tokens=most_tokens,
        overhead_tokens=overhead_tokens,
        attention_cost=attention_cost,
    )


def shapes_for(
    sampled: Sequence[np.ndarray],
    query: assemble.Template,
    document: assemble.Template,
    *,
    devices: int,
    pairs: int,
    row_length: int | None,
    rows: int | None,
    hidden_size: int,
    intermediate_size: int,
    most_tokens: int,
    overhead_tokens: int = 16,
    attention_cost: float = 1.0,
    positives: int = 1,
    negatives: int = 0,
    ladder: Sequence[int] | Literal["auto"] = (),
) -> layout.Shapes:
    """The shapes of a run: given ones are kept, others chosen from sampled batches.

    sampled: lengths of the texts that a device gets, of some batches (`sample_lengths`).
    `most_tokens` bounds the token slots of a microbatch, thereby its activations;
    `overhead_tokens` is what a microbatch costs beside its slots, `attention_cost` what a
    multiply-add of attention takes over one of the matrices. Raises ConfigError for a row length
    that is too short or no multiple of 8.
    """
    longest = max(query.longest, document.longest)
    if row_length is not None and (row_length < longest or row_length % layout.TOKENS_PER_SLOT):
        raise errors.ConfigError(
            f"data.row_length: {row_length} must be a multiple of {layout.TOKENS_PER_SLOT} and at "
            f"least the longest text, {longest} tokens; leave it out to have it chosen"
        )
    if row_length is None:
        row_length = layout.choose_row_length(
            sampled, longest, hidden_size, intermediate_size, attention_cost
        )
    slots = row_length // layout.TOKENS_PER_SLOT
    counts = (
        [layout.pack(lengths, row_length, slots)[3] for lengths in sampled]
        if rows is None or ladder == "auto"
        else []
    )
    if rows is None:
        rows = layout.choose_rows(counts, row_length, most_tokens, overhead_tokens)
    shapes = layout.Shapes(
        devices=devices,
        pairs=pairs,
        row_length=row_length,
        rows=rows,
        query_length=query.longest,
        document_length=document.longest,
        positives=positives,
        negatives=negatives,
    )
    if ladder == "auto":
        ladder = layout.choose_ladder(counts, shapes)
    return replace(shapes, ladder=tuple(ladder))


def sampled_steps(draw: Draw) -> list[int]:
    """Steps spread over the first epoch."""
    return sorted({int(step) for step in np.linspace(0, draw.steps_per_epoch - 1, _SAMPLES)})


def sample_lengths(
    views: Sequence[SourceView],
    draw: Draw,
    query: assemble.Template,
    document: assemble.Template,
    devices: int,
) -> list[np.ndarray]:
    """Lengths as encoded of the texts that a device gets, of batches spread over the first
    epoch."""
    sampled = []
    for step in sampled_steps(draw):
        drawn = draw.at(step)
        view, records = views[drawn.source], drawn.records
        queries = query.lengths(view.query_lengths(records))
        documents = document.lengths(view.document_lengths(records))
        # Dealing gives every device nearly the same: one pair of every N, by length.
        share = np.argsort(queries + documents, kind="stable")[devices // 2 :: devices]
        _, first = np.unique(view.document_ids(records[share]), return_index=True)
        sampled.append(np.concatenate([queries[share], documents[share][first]]))
    return sampled
