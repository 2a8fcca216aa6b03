"""From queries with several documents each to devices: who encodes what, and what is whose label.

The counterpart of `layout.deal` for fine-tuning. *Shared*: every document is a column for the
queries of all devices, so it is encoded once per global batch, by the device of the first query
that names it, and labels are columns of the gathered documents. Otherwise a query sees its own
documents alone: they lie on its device, nothing is gathered, labels are places among the device's
documents, and a document that queries of several devices name is encoded by each of them.

Axis letters: B queries of the batch, C documents of a query (P positives, then M negatives), U
distinct documents of the batch, N devices, b queries a device, W document places of a device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from arcticjax.data.layout import lightest_first


@dataclass(frozen=True)
class ListDeal:
    """Which device has which queries and documents; the same on every process.

    queries_Nb: index into the batch of each device's queries. documents: per device, the distinct
    documents that it encodes. labels_NbC: column (shared) or place on the device of each query's
    documents, -1 = none. row_groups_Nb, column_groups_NW: shared only; a query is of one group with
    all documents that are known to answer it, also where they came as another query's negatives.
    -1 marks an empty document place.
    """

    queries_Nb: np.ndarray
    documents: list[np.ndarray]
    labels_NbC: np.ndarray
    row_groups_Nb: np.ndarray | None = None
    column_groups_NW: np.ndarray | None = None

    def arrays(self) -> list[np.ndarray]:
        """All of it, to compare with what another process has."""
        groups = (self.row_groups_Nb, self.column_groups_NW)
        return [
            self.queries_Nb,
            *self.documents,
            self.labels_NbC,
            *(one for one in groups if one is not None),
        ]


def deal_lists(
    query_ids_B: np.ndarray,
    documents_BC: np.ndarray,
    known_BP: np.ndarray,
    query_lengths_B: np.ndarray,
    document_lengths_U: np.ndarray,
    devices: int,
    *,
    shared: bool,
) -> ListDeal:
    """Deals queries to devices, longest first, each to the lightest device that has room.

    documents_BC, known_BP: numbers of distinct documents in range(U), -1 = none; known_BP: all
    documents of the batch that answer a query. Lengths count tokens as encoded. Raises ValueError
    where B is not a multiple of `devices`.
    """
    total, width = documents_BC.shape
    if total % devices:
        raise ValueError(f"{total} queries do not divide among {devices} devices")
    room, count = total // devices, len(document_lengths_U)
    there_BC = documents_BC >= 0
    lengths_BC = np.where(there_BC, document_lengths_U[np.maximum(documents_BC, 0)], 0)
    if not shared:
        device_B = lightest_first(query_lengths_B + lengths_BC.sum(axis=1), devices, room)
        queries_Nb = np.argsort(device_B, kind="stable").reshape(devices, room)
        documents, labels = [], []
        for queries_b in queries_Nb:
            named_bC = documents_BC[queries_b]
            own = np.unique(named_bC[named_bC >= 0])
            documents.append(own)
            labels.append(np.where(named_bC >= 0, np.searchsorted(own, named_bC), -1))
        return ListDeal(queries_Nb, documents, np.stack(labels).astype(np.int32))

    # The first query that names a document owns it.
    owner_U = np.full(count, -1, np.int64)
    flat = documents_BC.reshape(-1)
    named, first = np.unique(flat, return_index=True)
    owner_U[named[named >= 0]] = first[named >= 0] // width
    owned_B = np.bincount(owner_U, document_lengths_U, total)
    weights_B = query_lengths_B + owned_B.astype(np.int64)
    device_B = lightest_first(weights_B, devices, room)
    queries_Nb = np.argsort(device_B, kind="stable").reshape(devices, room)
    rows_B, columns_U = _components(query_ids_B, known_BP, count)
    documents = []
    column_of_U = np.full(count, -1, np.int64)
    column_groups_NW = np.full((devices, room * width), -1, np.int32)
    for device in range(devices):
        own = np.flatnonzero(device_B[owner_U] == device)
        documents.append(own)
        column_of_U[own] = device * room * width + np.arange(len(own))
        column_groups_NW[device, : len(own)] = columns_U[own]
    labels_BC = np.where(there_BC, column_of_U[np.maximum(documents_BC, 0)], -1)
    return ListDeal(
        queries_Nb,
        documents,
        labels_BC[queries_Nb].astype(np.int32),
        rows_B[queries_Nb],
        column_groups_NW,
    )


def _components(
    query_ids_B: np.ndarray, known_BP: np.ndarray, documents: int
) -> tuple[np.ndarray, np.ndarray]:
    """Groups of queries and documents: connected by "answers", numbered from 0."""
    _, query_B = np.unique(query_ids_B, return_inverse=True)
    queries = int(query_B.max()) + 1
    rows, slots = np.nonzero(known_BP >= 0)
    edges = sparse.coo_array(
        (np.ones(len(rows), np.int8), (query_B[rows], queries + known_BP[rows, slots])),
        shape=(queries + documents, queries + documents),
    )
    groups = csgraph.connected_components(edges, directed=False)[1].astype(np.int32)
    return groups[query_B], groups[queries:]
