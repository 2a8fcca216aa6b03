"""What the sections of all configs share: strictness, and types of values."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from arcticjax.config.contract import MIN_LENGTH

Text = Annotated[str, Field(min_length=1)]
# A name becomes a folder: it must not climb out of its parent or hide in it.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Length = Annotated[int, Field(ge=MIN_LENGTH)]
PositiveNumber = Annotated[float, Field(gt=0)]
# ISO 639-1 where there is one, else 639-2 or 639-3: what model cards use.
Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A section of a config."""

    # Strict: YAML already says what is text, a number or true; "64" or true for 64 is a slip.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
