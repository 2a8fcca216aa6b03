"""Reading what a job is from a small YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from arcticjax.config import yaml_text
from arcticjax.errors import ConfigError
from launch.commands import check_no_secret
from launch.flags import PRESETS

# As Kubernetes and Google Cloud take them; GKE appends to a JobSet's, so it stays short.
Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$")]
Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]

SpecType = TypeVar("SpecType", bound="Spec")


class Spec(BaseModel):
    """A job; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Name = Field(description="Of the job and of everything that is made for it.")
    command: list[Text] = Field(
        min_length=1,
        description="The stage and its arguments, run in the source tree by every process.",
    )
    flags: Text | None = Field(default=None, description="A preset of launch.flags.")

    @model_validator(mode="after")
    def _preset_exists(self) -> Self:
        if self.flags is not None and self.flags not in PRESETS:
            raise ValueError(f"flags: no preset {self.flags!r}; there are {', '.join(PRESETS)}")
        return self

    @property
    def process(self) -> list[str]:
        """The command as each process is started, with its flags."""
        if self.flags is None:
            return list(self.command)
        return ["python", "-m", "launch.flags", self.flags, "--", *self.command]


def load(file: str | Path, kind: type[SpecType]) -> SpecType:
    """Reads a spec; raises ConfigError with every problem in it."""
    path = Path(file)
    try:
        with path.open("rb") as stream:
            content = stream.read(yaml_text.MAX_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if len(content) > yaml_text.MAX_BYTES:
        raise ConfigError(f"{path}: is larger than 1 MB, so it is no spec")
    parsed = yaml_text.parse(text)
    if parsed.notes:
        raise ConfigError(f"{path}: {'; '.join(map(_told, parsed.notes))}")
    if not isinstance(parsed.value, dict):
        raise ConfigError(f"{path}: expected fields, such as name: and command:")
    try:
        spec = kind.model_validate(parsed.value)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise ConfigError(
            f"{path}: {'; '.join(lines)}. Fields: {', '.join(kind.model_fields)}"
        ) from None
    check_no_secret(spec.command)
    return spec


def _told(note: yaml_text.Note) -> str:
    line = f"line {note.line}" if note.line else ""
    return ": ".join(filter(None, (line, ".".join(map(str, note.path)), note.message)))
