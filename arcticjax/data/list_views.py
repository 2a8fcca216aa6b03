"""Sources of lists seen through a cut: which documents a query brings at which step.

Axis letters: B queries of a batch, P positives in use, M hard negatives, C = P + M documents of a
query, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arcticjax.data import negatives
from arcticjax.data.draw import permutation_keys
from arcticjax.data.lists import StoredLists
from arcticjax.data.negatives import Cut, Yield
from arcticjax.data.policy import Policy
from arcticjax.errors import DataError

# Queries whose lists are cut at once when yields are counted.
_AT_ONCE = 512


@dataclass(frozen=True)
class Selected:
    """The queries of a batch and their documents, by number within a view; -1 = none.

    documents_BC: first the P positives, then the M negatives; scores_BC: the teacher's, NaN =
    unknown. known_BP: all positives that the query is known to have, also those not in use.
    """

    query_ids_B: np.ndarray
    query_lengths_B: np.ndarray
    documents_BC: np.ndarray
    scores_BC: np.ndarray
    known_BP: np.ndarray


class ListView:
    """One or more sources of lists seen as one: a record is one use of one query.

    Only queries that pass every stage of the policy are records, so that an epoch is the same set
    throughout a run. yields: what each stage leaves, over all queries.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[StoredLists],
        policy: Policy,
        weight: float | None = None,
        kept: Sequence[np.ndarray] | None = None,
        yields: Sequence[Yield] | None = None,
    ) -> None:
        self.name = name
        self.parts = list(parts)
        self.policy = policy
        self.weight = weight
        if kept is None or yields is None:
            (part,) = parts
            kept_Q, yields = _kept(part, policy)
            kept = [kept_Q]
        self.kept = list(kept)
        self.yields = list(yields)
        self._starts = np.cumsum([0, *(len(one) * policy.uses for one in self.kept)])
        self._documents = np.cumsum([0, *(len(part.document_ids) for part in self.parts)])

    @classmethod
    def merged(cls, name: str, views: Sequence[ListView], weight: float | None) -> ListView:
        """Several views as one."""
        return cls(
            name,
            [part for view in views for part in view.parts],
            views[0].policy,
            weight,
            [kept for view in views for kept in view.kept],
            [sum(stage, Yield()) for stage in zip(*(view.yields for view in views), strict=True)],
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def describe(self) -> str:
        """Its size in words, for messages."""
        worst = min(self.yields, key=lambda one: one.kept)
        return f"{self.name} ({len(self)} queries in an epoch; {worst})"

    def select(self, records: np.ndarray, epoch: int, progress: float) -> Selected:
        """The queries of `records` and their documents; a pure function of its arguments.

        progress: the share of the run that is done.
        """
        records = np.asarray(records, np.int64)
        cut = self.policy.cut_at(progress)
        found: list[tuple[np.ndarray, Selected]] = []
        part_B = np.searchsorted(self._starts, records, side="right") - 1
        for part in np.unique(part_B).tolist():
            places = np.flatnonzero(part_B == part)
            own = records[places] - self._starts[part]
            selected = self._select(part, own, epoch, cut)
            found.append((places, selected))
        width = max(one.known_BP.shape[1] for _, one in found)
        order = np.argsort(np.concatenate([places for places, _ in found]))

        def joined(name: str) -> np.ndarray:
            arrays = [getattr(one, name) for _, one in found]
            if name == "known_BP":
                arrays = [
                    np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=-1)
                    for array in arrays
                ]
            return np.concatenate(arrays)[order]

        return Selected(*(joined(name) for name in Selected.__dataclass_fields__))

    def query_tokens(self, records: np.ndarray) -> list[np.ndarray]:
        """Token ids of the queries of `records`."""
        if len(self.parts) == 1:
            return self.parts[0].queries(self._query(0, np.asarray(records, np.int64)))
        found: list[np.ndarray] = []
        for record in np.asarray(records).tolist():
            part = int(np.searchsorted(self._starts, record, side="right")) - 1
            query = self._query(part, np.array([record - self._starts[part]]))
            found += self.parts[part].queries(query)
        return found

    def document_ids(self, numbers: np.ndarray) -> np.ndarray:
        """Text ids of documents, uint64."""
        return self._of_documents("document_ids", numbers, np.uint64)

    def document_lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Own tokens of documents."""
        return self._of_documents("document_lengths", numbers, np.int64)

    def document_tokens(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Token ids of documents."""
        if len(self.parts) == 1:
            return self.parts[0].documents(np.asarray(numbers, np.int64))
        found: list[np.ndarray] = []
        for number in np.asarray(numbers).tolist():
            part = int(np.searchsorted(self._documents, number, side="right")) - 1
            found += self.parts[part].documents(np.array([number - self._documents[part]]))
        return found

    def _query(self, part: int, own: np.ndarray) -> np.ndarray:
        kept = self.kept[part]
        return kept[own % len(kept)]

    def _select(self, part: int, own: np.ndarray, epoch: int, cut: Cut) -> Selected:
        lists, policy = self.parts[part], self.policy
        queries = self._query(part, own)
        candidates, eligible = policy.eligible(lists, queries, cut)
        keys = permutation_keys("negatives", policy.seed, lists.name, epoch)
        chosen_BM = negatives.choose(
            eligible.mask_QK,
            candidates,
            queries,
            policy.count,
            sampling=policy.sampling,
            keys=keys,
            temperature=policy.temperature,
            use_Q=own // len(self.kept[part]),
        )
        sides = (
            (candidates.positives_QP, candidates.positive_scores_QP, eligible.positives_QP),
            (candidates.ids_QK, candidates.scores_QK, chosen_BM),
        )
        documents_BC = np.concatenate([_at(ids, places, -1) for ids, _, places in sides], axis=1)
        scores_BC = np.concatenate([_at(some, at, np.nan) for _, some, at in sides], axis=1)
        offset = self._documents[part]
        return Selected(
            lists.query_ids[queries],
            lists.query_lengths[queries],
            np.where(documents_BC >= 0, documents_BC + offset, -1),
            scores_BC.astype(np.float32),
            np.where(candidates.positives_QP >= 0, candidates.positives_QP + offset, -1),
        )

    def _of_documents(self, name: str, numbers: np.ndarray, dtype: type) -> np.ndarray:
        numbers = np.asarray(numbers, np.int64)
        result = np.empty(numbers.shape, dtype)
        part_D = np.searchsorted(self._documents, numbers, side="right") - 1
        for part in np.unique(part_D).tolist():
            there = part_D == part
            result[there] = getattr(self.parts[part], name)[numbers[there] - self._documents[part]]
        return result


def _at(values_QK: np.ndarray, places_QM: np.ndarray, fill: float) -> np.ndarray:
    found_QM = np.take_along_axis(values_QK, np.maximum(places_QM, 0), axis=1)
    return np.where(places_QM >= 0, found_QM, fill)


def _kept(lists: StoredLists, policy: Policy) -> tuple[np.ndarray, list[Yield]]:
    """Numbers of the queries that pass every stage, and the yield of each stage.

    Raises DataError where none is left, or where thresholds stand on scores that are not there.
    """
    cuts = list(dict.fromkeys(cut for _, cut in policy.stages))
    by_score = policy.sampling == "weighted" and policy.count > 0
    by_score |= any(cut.upper or cut.lower or cut.retrieved for cut in cuts)
    if by_score and not lists.scored:
        raise DataError(
            f"source {lists.name!r}: data.negatives.thresholds, retrieved_positives and sampling: "
            "weighted need a teacher's scores, which its negatives or positives do not all have; "
            "give data.sources scores or candidates, or choose by data.negatives.window alone"
        )
    totals = [Yield() for _ in cuts]
    kept_Q = np.ones(len(lists), bool)
    for start in range(0, len(lists), _AT_ONCE):
        queries = np.arange(start, min(start + _AT_ONCE, len(lists)))
        for index, cut in enumerate(cuts):
            _, found = policy.eligible(lists, queries, cut)
            totals[index] += found.found
            kept_Q[queries] &= found.kept_Q
    if not kept_Q.any():
        lines = "".join(f"\n  {one}" for one in totals)
        raise DataError(
            f"source {lists.name!r}: no query has {policy.minimum} hard negatives at every stage "
            f"of data.negatives:{lines}\nRaise the upper threshold, lower the lower one, widen the "
            "rank window, ask for fewer (count, minimum), or mine deeper (top_k)"
        )
    return np.flatnonzero(kept_Q), totals
