"""Which candidates of a query become its hard negatives: thresholds, ranks, exclusions, choice.

Mining stores a deep list of candidates with the teacher's scores once; everything here is cut from
it when data is loaded, so that another threshold needs no other mining. Candidates pass in order

    1. a positive of the query is never its negative, nor is a text that equals one, nor a text
       further up the list again, nor another piece of the document that a positive is from;
    2. the rank window: ranks count from 1, best first, over what 1. has left;
    3. the upper and the lower threshold.

A relative threshold is measured from a query's own positives, because queries differ in how near
other documents come (arXiv 2405.05374, section on tunable negatives, found absolute thresholds; the
released code takes 0.95 of the lowest positive). Scores may be negative: a percentage is a step
*down* from the positive by that share of its size, so the limit never lies above the positive.

Axis letters: Q queries, K candidates of a query, P positives of a query, M negatives of a query.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from arcticjax.data.draw import keyed_hash

Sampling = Literal["top", "random", "weighted"]


@dataclass(frozen=True)
class Threshold:
    """A limit on scores: `absolute` the score `value`; `percent` the share `value` of a positive's
    score (0.95: 5 % of its size below it); `margin` the positive's score less `value`.

    of: the query's `lowest` positive or the `mean` of them; absolute limits ignore it.
    """

    kind: Literal["absolute", "percent", "margin"]
    value: float
    of: Literal["lowest", "mean"] = "lowest"

    def limits(self, positive_scores_QP: np.ndarray) -> np.ndarray:
        """The limit of each query, float64 [Q]; NaN where it needs a positive's score and there is
        none. positive_scores_QP: NaN = none."""
        if self.kind == "absolute":
            return np.full(len(positive_scores_QP), self.value, np.float64)
        scores_QP = np.asarray(positive_scores_QP, np.float64)
        known_QP = ~np.isnan(scores_QP)
        if self.of == "lowest":
            base_Q = np.where(known_QP, scores_QP, np.inf).min(axis=1, initial=np.inf)
        else:
            base_Q = np.where(known_QP, scores_QP, 0).sum(axis=1) / np.maximum(known_QP.sum(1), 1)
        base_Q = np.where(known_QP.any(axis=1), base_Q, np.nan)
        down_Q = self.value if self.kind == "margin" else (1 - self.value) * np.abs(base_Q)
        return base_Q - down_Q


@dataclass(frozen=True)
class Cut:
    """The rule that candidates must pass to be eligible.

    upper, lower: a score of exactly the limit passes both. first_rank, last_rank: the window, both
    included, None = to the end of the list. retrieved: positives that score below the last
    candidate of a list (were not found by the teacher among so many) are not used.
    """

    upper: Threshold | None = None
    lower: Threshold | None = None
    first_rank: int = 1
    last_rank: int | None = None
    retrieved: bool = False


@dataclass(frozen=True)
class Candidates:
    """Candidates and positives of some queries.

    ids_QK, positives_QP: integers that tell documents apart, -1 = none, at the end of a row.
    scores_QK, positive_scores_QP: float32, the teacher's; NaN = unknown. Candidates descend.
    duplicate_QK: candidates that are texts of a positive or of an earlier candidate in another
    guise; sibling_QK: candidates that are pieces of the document that a positive is a piece of;
    None = none is known.
    """

    ids_QK: np.ndarray
    scores_QK: np.ndarray
    positives_QP: np.ndarray
    positive_scores_QP: np.ndarray
    duplicate_QK: np.ndarray | None = None
    sibling_QK: np.ndarray | None = None

    @classmethod
    def from_lists(
        cls,
        ids: Sequence[Sequence[Hashable]],
        scores: Sequence[Sequence[float]],
        positives: Sequence[Sequence[Hashable]],
        positive_scores: Sequence[Sequence[float]],
    ) -> Candidates:
        """From one list per query; ids of any kind, told apart by equality."""
        codes: dict[Hashable, int] = {}

        def coded(rows: Sequence[Sequence[Hashable]]) -> list[list[int]]:
            return [[codes.setdefault(one, len(codes)) for one in row] for row in rows]

        return cls(
            padded(coded(ids), -1, np.int64),
            padded(scores, np.nan, np.float32),
            padded(coded(positives), -1, np.int64),
            padded(positive_scores, np.nan, np.float32),
        )


@dataclass(frozen=True)
class Yield:
    """What a cut leaves, as counts that add up over parts of a data set.

    queries = no_positive + too_few + kept. candidates = positives + duplicates + siblings +
    out_of_window + above + below + eligible, over the queries that have a positive; a candidate
    counts for the first rule that it fails.
    """

    queries: int = 0
    no_positive: int = 0
    too_few: int = 0
    kept: int = 0
    candidates: int = 0
    positives: int = 0
    duplicates: int = 0
    siblings: int = 0
    out_of_window: int = 0
    above: int = 0
    below: int = 0
    eligible: int = 0

    def __add__(self, other: Yield) -> Yield:
        both = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Yield(*(one + two for one, two in both))

    def __str__(self) -> str:
        each = self.eligible / max(1, self.queries - self.no_positive)
        return (
            f"{self.kept:,} of {self.queries:,} queries kept ({self.no_positive:,} without a "
            f"positive, {self.too_few:,} with too few negatives); {self.eligible:,} of "
            f"{self.candidates:,} candidates eligible, {each:.1f} a query ({self.positives:,} are "
            f"positives, {self.duplicates:,} duplicates, {self.siblings:,} of a positive's own "
            f"document, {self.out_of_window:,} outside the rank window, {self.above:,} above the "
            f"upper threshold, {self.below:,} below the lower)"
        )


@dataclass(frozen=True)
class Eligible:
    """Candidates that may be negatives.

    mask_QK: which; kept_Q: queries that have a positive and enough of them; positives_QP: places
    among the given positives of those in use, best first, -1 = none; found: the counts.
    """

    mask_QK: np.ndarray
    kept_Q: np.ndarray
    positives_QP: np.ndarray
    found: Yield


def apply(cut: Cut, candidates: Candidates, *, minimum: int, most_positives: int = 1) -> Eligible:
    """Candidates that pass `cut`, for every query.

    minimum: a query with fewer is not kept. most_positives: positives in use, those that the
    teacher scores highest; relative thresholds are measured from these alone, while a candidate
    must differ from all.
    """
    given_QK = candidates.ids_QK >= 0
    positives_QP = _positives_in_use(cut, candidates, most_positives)
    in_use_QP = positives_QP >= 0
    scores_QP = np.take_along_axis(
        candidates.positive_scores_QP, np.maximum(positives_QP, 0), axis=1
    )
    scores_QP = np.where(in_use_QP, scores_QP, np.nan)
    answerable_Q = np.asarray(in_use_QP.any(axis=1))
    for threshold in (cut.upper, cut.lower):
        if threshold is not None:
            answerable_Q &= ~np.isnan(threshold.limits(scores_QP))

    rest_QK = given_QK & answerable_Q[:, None]
    total = int(rest_QK.sum())

    def leave_out(failing_QK: np.ndarray) -> int:
        nonlocal rest_QK
        before = int(rest_QK.sum())
        rest_QK = rest_QK & ~failing_QK
        return before - int(rest_QK.sum())

    positives = leave_out(among(candidates.ids_QK, candidates.positives_QP))
    repeated_QK = _repeated(candidates.ids_QK)
    if candidates.duplicate_QK is not None:
        repeated_QK |= candidates.duplicate_QK
    duplicates = leave_out(repeated_QK)
    siblings = 0 if candidates.sibling_QK is None else leave_out(candidates.sibling_QK)
    ranks_QK = np.cumsum(rest_QK, axis=1)
    last = np.inf if cut.last_rank is None else cut.last_rank
    out_of_window = leave_out((ranks_QK < cut.first_rank) | (ranks_QK > last))
    above = leave_out(_fails(cut.upper, np.less_equal, candidates, scores_QP))
    below = leave_out(_fails(cut.lower, np.greater_equal, candidates, scores_QP))

    enough_Q = rest_QK.sum(axis=1) >= minimum
    kept_Q = answerable_Q & enough_Q
    found = Yield(
        queries=len(kept_Q),
        no_positive=int((~answerable_Q).sum()),
        too_few=int((answerable_Q & ~enough_Q).sum()),
        kept=int(kept_Q.sum()),
        candidates=total,
        positives=positives,
        duplicates=duplicates,
        siblings=siblings,
        out_of_window=out_of_window,
        above=above,
        below=below,
        eligible=int(rest_QK.sum()),
    )
    return Eligible(rest_QK, kept_Q, positives_QP, found)


def choose(
    eligible_QK: np.ndarray,
    candidates: Candidates,
    queries_Q: np.ndarray,
    count: int,
    *,
    sampling: Sampling,
    keys: np.ndarray,
    temperature: float = 0.05,
    use_Q: np.ndarray | int = 0,
) -> np.ndarray:
    """Places (int64, [Q, count]) among the candidates of the negatives of each query; -1 = none.

    top: the best-scored; random: any, equally likely; weighted: drawn one after another without
    replacement, each with probability proportional to exp(score / temperature). What is drawn for a
    query depends on `keys` (of `draw.permutation_keys`), the query's number and the documents'
    alone, not on what else is in the batch. use_Q: the how-manieth use of the query, from 0; uses
    with the same keys share no negative.

    Weighted sampling takes the largest score / temperature + Gumbel noise (Efraimidis and Spirakis
    2006; Kool et al. 2019, arXiv 1903.06059).
    """
    total_Q, depth = eligible_QK.shape
    use_Q = np.broadcast_to(np.asarray(use_Q, np.int64), (total_Q,))
    if sampling == "top":
        priority_QK = np.broadcast_to(np.arange(depth, dtype=np.float64), (total_Q, depth))
    else:
        hashed_Q = keyed_hash(np.asarray(queries_Q).astype(np.uint64), keys[0])
        mixed_QK = keyed_hash(hashed_Q[:, None] ^ candidates.ids_QK.astype(np.uint64), keys[1])
        uniform_QK = ((np.right_shift(mixed_QK, np.uint64(32))).astype(np.float64) + 0.5) / 2**32
        priority_QK = uniform_QK
        if sampling == "weighted":
            scores_QK = np.where(eligible_QK, candidates.scores_QK, 0).astype(np.float64)
            priority_QK = np.log(-np.log(uniform_QK)) - scores_QK / temperature
    priority_QK = np.where(eligible_QK, priority_QK, np.inf)
    order_QK = np.argsort(priority_QK, axis=1, kind="stable")
    places_QM = use_Q[:, None] * count + np.arange(count)
    inside_QM = places_QM < eligible_QK.sum(axis=1, keepdims=True)
    chosen_QM = np.take_along_axis(order_QK, np.minimum(places_QM, max(depth - 1, 0)), axis=1)
    return np.where(inside_QM, chosen_QM, -1)


def padded(rows: Sequence[Sequence[float]], fill: float, dtype: type) -> np.ndarray:
    """Lists of any lengths as one array, at least one wide, filled up with `fill`."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    wide = np.full((len(rows), max(1, int(lengths.max(initial=0)))), fill, dtype)
    wide[np.arange(wide.shape[1]) < lengths[:, None]] = [one for row in rows for one in row]
    return wide


def among(ids_QK: np.ndarray, others_QP: np.ndarray) -> np.ndarray:
    """Which entries are among the others of their row."""
    found_QK = np.zeros(ids_QK.shape, bool)
    for others_Q in others_QP.T:
        found_QK |= ids_QK == others_Q[:, None]
    return found_QK


def _fails(
    threshold: Threshold | None,
    passes: Callable[..., np.ndarray],
    candidates: Candidates,
    positive_scores_QP: np.ndarray,
) -> np.ndarray:
    """Candidates that do not pass a threshold; one of unknown score passes none."""
    if threshold is None:
        return np.zeros(candidates.ids_QK.shape, bool)
    limits_Q = threshold.limits(positive_scores_QP).astype(np.float32)
    with np.errstate(invalid="ignore"):
        return ~passes(candidates.scores_QK, limits_Q[:, None])


def _positives_in_use(cut: Cut, candidates: Candidates, most: int) -> np.ndarray:
    """Places of each query's best-scored positives, [Q, most]; unscored ones last, as listed."""
    scores_QP = candidates.positive_scores_QP
    usable_QP = candidates.positives_QP >= 0
    usable_QP &= ~_repeated(candidates.positives_QP)
    if cut.retrieved:
        known_QK = ~np.isnan(candidates.scores_QK)
        worst_Q = np.where(known_QK, candidates.scores_QK, np.inf).min(axis=1, initial=np.inf)
        with np.errstate(invalid="ignore"):
            usable_QP &= scores_QP >= worst_Q[:, None]
    priority_QP = np.where(np.isnan(scores_QP), 3e38, -scores_QP)
    priority_QP = np.where(usable_QP, priority_QP, np.inf)
    order_QP = np.argsort(priority_QP, axis=1, kind="stable")[:, :most]
    order_QP = np.where(np.take_along_axis(usable_QP, order_QP, axis=1), order_QP, -1)
    missing = most - order_QP.shape[1]
    return np.pad(order_QP, ((0, 0), (0, max(0, missing))), constant_values=-1)


def _repeated(ids_QK: np.ndarray) -> np.ndarray:
    """Entries that equal an earlier one of their row."""
    order_QK = np.argsort(ids_QK, axis=1, kind="stable")
    sorted_QK = np.take_along_axis(ids_QK, order_QK, axis=1)
    again_QK = np.zeros(ids_QK.shape, bool)
    again_QK[:, 1:] = sorted_QK[:, 1:] == sorted_QK[:, :-1]
    result_QK = np.empty_like(again_QK)
    np.put_along_axis(result_QK, order_QK, again_QK, axis=1)
    return result_QK
