"""A batch with hard negatives said by ids, and how it lies on devices.

The batch knows texts and which belongs to which; positions, the order of columns and padding are of
a layout alone. What several devices give is compared with the one-device layout by document id.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from arcticjax.losses import Labels
from tests.losses.problems import make_labels, normalise
from tests.step.plain import union

QUERIES, WIDTH, GUIDE_WIDTH = 16, 16, 6
POSITIVES, NEGATIVES = 3, 3  # places of a query; not all are taken


@dataclass
class Batch:
    """positives, negatives: document ids of each query."""

    queries: np.ndarray
    documents: np.ndarray
    positives: list[list[int]]
    negatives: list[list[int]]
    groups: np.ndarray
    guide_queries: np.ndarray
    guide_documents: np.ndarray


def make_batch(seed, *, several: bool, hard: bool, repeated: bool) -> Batch:
    """several: up to three positives a query; hard: up to three hard negatives, some of them shared
    by queries (so by devices), some a positive of another query, one named twice and one that is
    also a positive of its query; repeated: queries and documents that occur more than once."""
    rng = np.random.default_rng(seed)
    positives = [[row] for row in range(QUERIES)]
    query_ids, positive_ids = np.arange(QUERIES), np.arange(QUERIES)
    fresh = QUERIES
    if several:
        for row in range(0, QUERIES, 2):
            more = 1 + row % 4 // 2
            positives[row] += range(fresh, fresh + more)
            fresh += more
    if repeated:
        query_ids[[5, 14]] = query_ids[1]  # on other devices
        for row, other in ((7, 2), (12, 2), (9, 10)):
            positives[row][0] = positive_ids[row] = positives[other][0]
    groups = union(query_ids, positive_ids)
    negatives: list[list[int]] = [[] for _ in range(QUERIES)]
    if hard:
        shared = range(fresh, fresh + 4)
        for row in range(QUERIES):
            own = fresh + 4 + row
            negatives[row] = [own, shared[row % 4], positives[(row + 3) % QUERIES][0]]
        negatives[3] = [shared[0], shared[0]]
        negatives[4] = [positives[4][0], shared[1]]
        negatives[6] = []
        fresh += 4 + QUERIES
    queries = normalise(rng.normal(size=(QUERIES, WIDTH)) + 0.3)
    documents = normalise(rng.normal(size=(fresh, WIDTH)) + 0.3)
    # Positives are near their query, as they should be, and as margin and guide suppose.
    for row, mine in enumerate(positives):
        for document in mine:
            documents[document] = normalise(documents[document] + 0.5 * queries[row])
    queries = queries[np.unique(query_ids, return_inverse=True)[1]] if repeated else queries
    rotation = rng.normal(size=(WIDTH, GUIDE_WIDTH))
    guides = [normalise(texts @ rotation + 0.2) for texts in (queries, documents)]
    return Batch(queries, documents, positives, negatives, groups, *guides)


@dataclass
class Layout:
    """Arrays of a batch for N devices, each device's part after the other's.

    documents: id of the document in each column, -1 = none.
    negatives_BM: as positives, for the loss over candidates; for in-batch negatives they are
        columns and nothing else.
    """

    documents: np.ndarray
    labels: Labels
    negatives_BM: np.ndarray


def lay_out(batch: Batch, devices: int, *, shared: bool) -> Layout:
    """Queries in order, and each device's documents beside it: positives, then negatives, then
    empty columns.

    shared: a document stands once, on the first device that names it, and positions are among all
    columns; otherwise on every device that names it, and positions are among that device's own.
    """
    room = QUERIES * (POSITIVES + NEGATIVES) // devices
    seen: set[int] = set()
    documents = np.full(devices * room, -1)
    places: list[dict[int, int]] = []
    for device in range(devices):
        rows = range(device * QUERIES // devices, (device + 1) * QUERIES // devices)
        named = [
            one for part in (batch.positives, batch.negatives) for row in rows for one in part[row]
        ]
        mine = [one for one in dict.fromkeys(named) if not (shared and one in seen)]
        seen.update(mine)
        documents[device * room : device * room + len(mine)] = mine
        places.append({one: place for place, one in enumerate(mine)})
    if shared:
        everywhere = {one: place for place, one in enumerate(documents.tolist()) if one >= 0}
        places = [everywhere] * devices

    def positions(named, slots):
        found = np.full((QUERIES, slots), -1)
        for row, mine in enumerate(named):
            where = places[row * devices // QUERIES]
            found[row, : len(mine)] = [where[one] for one in mine]
        return found

    # A document that is nobody's positive is of no query's group.
    group_of = QUERIES + np.arange(len(batch.documents))
    for row, mine in enumerate(batch.positives):
        group_of[mine] = batch.groups[row]
    columns = np.where(documents >= 0, group_of[documents], -1)
    return Layout(
        documents,
        make_labels(positions(batch.positives, POSITIVES), batch.groups, columns),
        positions(batch.negatives, NEGATIVES).astype(np.int32),
    )


def in_columns(texts: np.ndarray, layout: Layout, dtype=jnp.float32):
    """The texts of each column; zero where it is empty."""
    found = texts[layout.documents] * (layout.documents >= 0)[:, None]
    return jnp.asarray(found, dtype)


def by_document(gradients, layout: Layout, count: int) -> np.ndarray:
    """Gradients of columns summed by document."""
    total = np.zeros((count, gradients.shape[1]))
    kept = layout.documents >= 0
    np.add.at(total, layout.documents[kept], np.asarray(gradients, np.float64)[kept])
    return total
