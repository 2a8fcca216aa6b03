"""Records that are not whole, be they pairs of texts, lists of them, or texts and relations of a
published set: an error, or left out and counted, up to a limit."""

from __future__ import annotations

import logging

from arcticjax.config.schema import SourceConfig
from arcticjax.errors import DataError

# So many records may all be judged by before the share of bad ones says something.
_FEW = 1000
_SHOWN = 5
_log = logging.getLogger(__name__)


class BadRecords:
    """Follows `bad_records` and `bad_records_limit` of a source while its records are read.

    left_out: how many were, so far.
    """

    def __init__(self, source: SourceConfig) -> None:
        self._source = source
        self._read = 0
        self.left_out = 0

    def good(self) -> None:
        """Counts a record that is in order."""
        self._read += 1

    def bad(self, problem: DataError, *, counted: bool = False) -> None:
        """Counts a record that is left out; raises DataError where the source allows none, or no
        more. counted: it was taken for a good one before."""
        if self._source.bad_records == "error":
            raise problem
        self._read += not counted
        self.left_out += 1
        if self.left_out <= _SHOWN:
            _log.warning("left out: %s", problem)
        if self.left_out > self._source.bad_records_limit * max(self._read, _FEW):
            raise self._too_many(problem)

    def end(self) -> None:
        """To be called after the last record; raises DataError where too many were left out."""
        if self.left_out > self._source.bad_records_limit * self._read:
            raise self._too_many(None)
        if self.left_out:
            _log.warning(
                "source %s: %d of %d records left out", self._source.name, self.left_out, self._read
            )

    def _too_many(self, problem: DataError | None) -> DataError:
        last = "" if problem is None else f"; the last: {problem}"
        return DataError(
            f"source {self._source.name!r}: {self.left_out} of the first {self._read} records are "
            f"not whole, more than data.sources bad_records_limit = "
            f"{self._source.bad_records_limit:g} allows{last}"
        )
