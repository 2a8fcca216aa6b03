"""What a text goes through before it is a vector: stored with data, checkpoint and export."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from arcticjax.errors import ConfigError

Pooling = Literal["cls", "mean", "last"]

# [CLS], one token of text, [SEP].
MIN_LENGTH = 3


@dataclasses.dataclass(frozen=True)
class TextContract:
    """Prompts, lengths, pooling and normalisation that training, search and export must share.

    A text becomes [CLS] prompt text [SEP]; lengths count all of these in tokens, and only the text
    is truncated. Two contracts that differ give vectors that cannot be compared.

    Raises:
        ConfigError: a field has the wrong type or an impossible value; all are listed.
    """

    query_prompt: str
    document_prompt: str
    query_length: int
    document_length: int
    pooling: Pooling
    normalize: bool = True

    def __post_init__(self) -> None:
        problems = []
        for name in ("query_prompt", "document_prompt"):
            value = getattr(self, name)
            if not isinstance(value, str):
                problems.append(f"{name}: expected text, got {value!r}")
        for name in ("query_length", "document_length"):
            value = getattr(self, name)
            if type(value) is not int or value < MIN_LENGTH:
                problems.append(
                    f"{name}: expected a whole number of tokens, {MIN_LENGTH} or more, "
                    f"got {value!r}"
                )
        if self.pooling not in get_args(Pooling):
            problems.append(f"pooling: expected cls, mean or last, got {self.pooling!r}")
        if type(self.normalize) is not bool:
            problems.append(f"normalize: expected true or false, got {self.normalize!r}")
        if problems:
            raise ConfigError("not a text contract: " + "; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """The contract as plain JSON values, for a manifest."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> TextContract:
        """The contract that `to_dict` gave.

        Raises:
            ConfigError: it is no mapping, a field is missing, unknown or has an impossible value.
        """
        if not isinstance(stored, Mapping):
            raise ConfigError(f"not a text contract: expected a mapping, got {stored!r}")
        names = [field.name for field in dataclasses.fields(cls)]
        # Nothing has a default here: a contract that was stored in part is not one to guess from.
        missing = [name for name in names if name not in stored]
        unknown = [str(name) for name in stored if name not in names]
        if missing or unknown:
            raise ConfigError(
                "not a text contract: "
                + "; ".join(
                    f"{kind} {', '.join(found)}"
                    for kind, found in (("missing", missing), ("unknown", unknown))
                    if found
                )
            )
        return cls(**stored)
