"""What a rule for configs finds wrong."""

from __future__ import annotations

Path = tuple[str | int, ...]
# The field to change, and what is wrong and what to do.
Problem = tuple[Path, str]


class Unknown(Exception):
    """The field that a rule reads has no valid value, which is reported elsewhere."""
