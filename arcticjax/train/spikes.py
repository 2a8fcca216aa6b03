"""Losses that are finite, and far from what they were."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 64  # steps of a source that a loss is held against
ENOUGH = 16  # of them, before anything is called far away
FACTOR = 8.0  # robust standard deviations
# Of the median: where losses hardly vary, noise is no spike.
_LEAST_SPREAD = 0.02
_DEVIATION = 1.4826  # standard deviation of a normal distribution / its median absolute deviation


class Spikes:
    """Tells which losses lie far above those before them, by source: sources differ more than steps
    do. What a start of the command has not seen itself it does not know."""

    def __init__(self) -> None:
        self._recent: dict[str, deque[float]] = {}

    def look(self, source: str, loss: float) -> str | None:
        """What is odd about a finite loss, or None; it then counts among those before the next."""
        recent = self._recent.setdefault(source, deque(maxlen=WINDOW))
        said = None
        if len(recent) >= ENOUGH:
            middle = statistics.median(recent)
            spread = _DEVIATION * statistics.median(abs(one - middle) for one in recent)
            if loss > middle + FACTOR * max(spread, _LEAST_SPREAD * abs(middle)):
                said = (
                    f"loss {loss:.4g} of source {source!r} is far above the median {middle:.4g} "
                    f"of its last {len(recent)} steps"
                )
        recent.append(loss)
        return said
