"""Batches of queries with hard negatives: step -> draw -> cut -> layout -> rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from arcticjax.data import assemble, layout, list_layout, pipeline
from arcticjax.data.draw import Draw
from arcticjax.data.list_views import Selected


class View(Protocol):
    """What shapes and layout need of a source of lists; see `list_views.ListView`."""

    @property
    def name(self) -> str: ...
    def select(self, records: np.ndarray, epoch: int, progress: float) -> Selected: ...
    def document_ids(self, numbers: np.ndarray) -> np.ndarray: ...
    def document_lengths(self, numbers: np.ndarray) -> np.ndarray: ...


class Lists(NamedTuple):
    """A batch's queries and distinct documents (U), in numbers of its view.

    lengths_U: as encoded; documents_BC, known_BP: indices into numbers_U, -1 = none.
    """

    selected: Selected
    query_lengths_B: np.ndarray
    numbers_U: np.ndarray
    lengths_U: np.ndarray
    documents_BC: np.ndarray
    known_BP: np.ndarray


@dataclass(frozen=True)
class ListBatchBuilder:
    """Builds the batch of any step, as `pipeline.BatchBuilder`.

    total_steps: of the run, by which a curriculum counts. shared: documents are columns for all
    queries; else each query has its own alone. taught: batches carry the teacher's scores.
    """

    views: Sequence[Any]
    draw: Draw
    shapes: layout.Shapes
    query: assemble.Template
    document: assemble.Template
    local: Sequence[int]
    total_steps: int
    shared: bool
    taught: bool = False
    pad_id: int = 0

    def __call__(self, step: int) -> pipeline.HostBatch:
        drawn = self.draw.at(int(step))
        view, shapes = self.views[drawn.source], self.shapes
        lists = batch_lists(
            view, drawn.records, drawn.epoch, int(step) / self.total_steps,
            self.query, self.document,
        )  # fmt: skip
        dealt = deal(lists, shapes.devices, shared=self.shared)
        local = list(self.local)
        parts = []
        for device in local:
            queries, documents = dealt.queries_Nb[device], dealt.documents[device]
            rows = pipeline.device_rows(
                shapes,
                (self.query, self.document),
                self.pad_id,
                (
                    view.query_tokens(drawn.records[queries]),
                    view.document_tokens(lists.numbers_U[documents]),
                ),
                (lists.query_lengths_B[queries], lists.lengths_U[documents]),
            )
            parts.append(rows)
        arrays = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        labels = dealt.labels_NbC[local]
        arrays["positives"] = labels[..., : shapes.positives]
        if self.shared:
            assert dealt.row_groups_Nb is not None and dealt.column_groups_NW is not None
            arrays["row_groups"] = dealt.row_groups_Nb[local]
            arrays["column_groups"] = dealt.column_groups_NW[local]
        if not self.shared or self.taught:
            arrays["negatives"] = labels[..., shapes.positives :]
        if self.taught:
            arrays["teacher"] = lists.selected.scores_BC[dealt.queries_Nb[local]]
        return pipeline.HostBatch(arrays, int(step), view.name, drawn, dealt)


def batch_lists(
    view: View,
    records: np.ndarray,
    epoch: int,
    progress: float,
    query: assemble.Template,
    document: assemble.Template,
) -> Lists:
    """The queries of `records`, and their documents, each text once."""
    selected = view.select(records, epoch, progress)
    wanted = np.unique(selected.documents_BC[selected.documents_BC >= 0])
    ids, first = np.unique(view.document_ids(wanted), return_index=True)
    numbers_U = wanted[first]

    def places(numbers_xC: np.ndarray) -> np.ndarray:
        found = view.document_ids(np.maximum(numbers_xC, 0))
        at = np.minimum(np.searchsorted(ids, found), len(ids) - 1)
        return np.where((numbers_xC >= 0) & (ids[at] == found), at, -1)

    return Lists(
        selected,
        query.lengths(selected.query_lengths_B),
        numbers_U,
        document.lengths(view.document_lengths(numbers_U)),
        places(selected.documents_BC),
        places(selected.known_BP),
    )


def deal(lists: Lists, devices: int, *, shared: bool) -> list_layout.ListDeal:
    """See `list_layout.deal_lists`."""
    return list_layout.deal_lists(
        lists.selected.query_ids_B,
        lists.documents_BC,
        lists.known_BP,
        lists.query_lengths_B,
        lists.lengths_U,
        devices,
        shared=shared,
    )


def sample_lengths(
    views: Sequence[View],
    draw: Draw,
    query: assemble.Template,
    document: assemble.Template,
    devices: int,
) -> list[np.ndarray]:
    """As `pipeline.sample_lengths`; hard negatives are those of the start and the end of a run in
    turn."""
    sampled = []
    for place, step in enumerate(pipeline.sampled_steps(draw)):
        drawn = draw.at(step)
        lists = batch_lists(
            views[drawn.source], drawn.records, drawn.epoch, float(place % 2), query, document
        )
        there_BC = lists.documents_BC >= 0
        lengths_BC = np.where(there_BC, lists.lengths_U[np.maximum(lists.documents_BC, 0)], 0)
        weights_B = lists.query_lengths_B + lengths_BC.sum(axis=1)
        share = np.argsort(weights_B, kind="stable")[devices // 2 :: devices]
        own = np.unique(lists.documents_BC[share][there_BC[share]])
        sampled.append(np.concatenate([lists.query_lengths_B[share], lists.lengths_U[own]]))
    return sampled
