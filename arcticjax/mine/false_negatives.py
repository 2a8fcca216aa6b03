"""How many candidates are probably relevant: an estimate from texts and scores.

A candidate is suspicious where its text is that of a positive or of the query but for case and
punctuation, nearly equals a positive, contains one whole (a short positive is an answer), or where
the teacher scores it above the query's best positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from arcticjax.data.near_duplicates import COMPARED_WORDS, SHINGLE, SIMILARITY, words_of

SIGNS = ("same text", "near-duplicate", "contains the answer", "above the positive")
# Ranks are counted in these ranges, from 1, both ends included.
RANKS = ((1, 1), (2, 5), (6, 20), (21, 100), (101, 1000))


@dataclass
class Estimate:
    """Counts over the compared queries.

    by_rank: for each range of ranks and sign, how many of `candidates` there show it. A candidate
    may show several signs; `suspicious` counts it once. queries_with: queries of which a candidate
    shows the sign.
    """

    queries: int = 0
    candidates: dict[tuple[int, int], int] = field(default_factory=dict)
    by_rank: dict[tuple[int, int], dict[str, int]] = field(default_factory=dict)
    suspicious: dict[tuple[int, int], int] = field(default_factory=dict)
    queries_with: dict[str, int] = field(default_factory=dict)

    def add(self, signs_of_each: Sequence[Sequence[str]]) -> None:
        """One query: the signs of its candidates, best first."""
        self.queries += 1
        for rank, signs in enumerate(signs_of_each, 1):
            near = next((one for one in RANKS if one[0] <= rank <= one[1]), RANKS[-1])
            self.candidates[near] = self.candidates.get(near, 0) + 1
            counts = self.by_rank.setdefault(near, {})
            for sign in signs:
                counts[sign] = counts.get(sign, 0) + 1
            self.suspicious[near] = self.suspicious.get(near, 0) + bool(signs)
        for sign in {sign for signs in signs_of_each for sign in signs}:
            self.queries_with[sign] = self.queries_with.get(sign, 0) + 1

    def table(self) -> list[list[str]]:
        """Header and rows: for each range of ranks the share of candidates that show each sign."""
        rows = [["rank", "candidates", *SIGNS, "any"]]
        for near in RANKS:
            total = self.candidates.get(near, 0)
            if not total:
                continue
            counts = self.by_rank.get(near, {})
            rows.append(
                [
                    f"{near[0]}" if near[0] == near[1] else f"{near[0]} to {near[1]}",
                    f"{total:,}",
                    *(f"{100 * counts.get(sign, 0) / total:.2f} %" for sign in SIGNS),
                    f"{100 * self.suspicious.get(near, 0) / total:.2f} %",
                ]
            )
        rows.append(
            [
                "queries with one",
                f"{self.queries:,}",
                *(
                    f"{100 * self.queries_with.get(sign, 0) / max(1, self.queries):.2f} %"
                    for sign in SIGNS
                ),
                "",
            ]
        )
        return rows


def signs(
    query: str,
    positives: Sequence[str],
    best_positive: float,
    candidates: Sequence[str],
    scores: Sequence[float],
) -> list[list[str]]:
    """For each candidate what makes it suspicious, in the order of SIGNS."""
    known = [words_of(text) for text in positives]
    own = words_of(query)
    shingles = [_shingles(words) for words in known]
    found = []
    for text, score in zip(candidates, scores, strict=True):
        words = words_of(text)
        same = any(words == one for one in (*known, own))
        near = not same and any(_near(_shingles(words), one) for one in shingles)
        joined = f" {' '.join(words)} "
        holds = not same and any(
            one and len(one) < len(words) and f" {' '.join(one)} " in joined for one in known
        )
        shown = (same, near, holds, score > best_positive)
        found.append([sign for sign, is_shown in zip(SIGNS, shown, strict=True) if is_shown])
    return found


def _shingles(words: list[str]) -> set[tuple[str, ...]]:
    words = words[:COMPARED_WORDS]
    return {tuple(words[n : n + SHINGLE]) for n in range(max(1, len(words) - SHINGLE + 1))}


def _near(left: set[tuple[str, ...]], right: set[tuple[str, ...]]) -> bool:
    return len(left & right) >= SIMILARITY * len(left | right)
