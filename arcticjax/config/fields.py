"""The schema as words: what a field expects, which names there are, the text of --help."""

from __future__ import annotations

import dataclasses
import textwrap
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from arcticjax.config.schema import RunConfig

Path = tuple[str | int, ...]
_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
_COMPARISONS = (
    (annotated_types.Ge, "ge", ">="),
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Le, "le", "<="),
    (annotated_types.Lt, "lt", "<"),
)


@dataclasses.dataclass(frozen=True)
class Place:
    """What the schema knows of a path: its type, without `None` and constraints in `annotation`."""

    annotation: Any
    metadata: tuple[Any, ...]
    field: FieldInfo | None

    @property
    def expected(self) -> str:
        return _phrase(self.annotation, self.metadata)

    @property
    def nullable(self) -> bool:
        """Whether null is a value here."""
        return any(option is type(None) for option in _options(self.annotation))

    @property
    def section(self) -> type[BaseModel] | None:
        """The model that a mapping here is read as, if any."""
        return next((o for o in _options(self.annotation) if _is_section(o)), None)

    @property
    def item(self) -> Any:
        """The type of a list's items; None where no list is allowed."""
        lists = [o for o in _options(self.annotation) if get_origin(o) is list]
        return get_args(lists[0])[0] if lists else None

    @property
    def choices(self) -> list[str]:
        """The words that are values here."""
        literals = [o for o in _options(self.annotation) if get_origin(o) is Literal]
        return [word for literal in literals for word in get_args(literal)]

    @property
    def free_text(self) -> bool:
        """Whether any text at all is a value here."""
        return any(_bare(o) is str for o in _options(self.annotation))


def root(schema: type[BaseModel]) -> Place:
    """The place of a whole config."""
    return Place(schema, (), None)


def place(path: Path, schema: type[BaseModel] = RunConfig) -> Place | None:
    """The place of a path, or None if the schema has no such path."""
    here = root(schema)
    for part in path:
        below = _below(here, part)
        if below is None:
            return None
        here = below
    return here


def longest(location: Path, schema: type[BaseModel] = RunConfig) -> Path:
    """The path within pydantic's error location, which also names branches of unions."""
    path: Path = ()
    for part in location:
        if place((*path, part), schema) is not None:
            path = (*path, part)
    return path


def field_names(schema: type[BaseModel] = RunConfig) -> list[str]:
    """Every dotted path to a field that is no section, lists of sections left out."""
    return [
        ".".join(map(str, path))
        for path, found in _walk((), root(schema))
        if "N" not in path and not _is_section(found.annotation)
    ]


def describe(schema: type[BaseModel] = RunConfig) -> str:
    """Every field of a config: dotted path, type, default and meaning, grouped by section."""
    lines = [
        "Fields of a config file; --set PATH=VALUE gives one on the command line. Relative paths",
        "start at the working directory, except where a field says otherwise.",
    ]
    for path, found in _walk((), root(schema)):
        assert found.field is not None
        description = found.field.description or ""
        if len(path) == 1 and _is_section(found.annotation):
            lines += ["", f"{path[0]}: {description}"]
            continue
        phrase = found.expected
        default = "required" if found.field.is_required() else f"default {_default(found.field)}"
        head = f"{'.'.join(map(str, path))}: {phrase}; {default}"
        lines += textwrap.wrap(head, 98, initial_indent="  ", subsequent_indent="    ")
        lines += textwrap.wrap(description, 98, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines) + "\n"


def _walk(path: Path, here: Place) -> Iterator[tuple[Path, Place]]:
    """Every field below `here`, each section before its fields; N stands for a list's index."""
    section = here.section
    if section is None:
        return
    for name in section.model_fields:
        below = _below(here, name)
        assert below is not None
        yield (*path, name), below
        yield from _walk((*path, name), below)
        item = below.item
        if item is not None and _is_section(item):
            yield from _walk((*path, name, "N"), Place(item, (), None))


def _below(here: Place, part: str | int) -> Place | None:
    section = here.section
    if section is not None and isinstance(part, str):
        field = section.model_fields.get(part)
        return None if field is None else Place(field.annotation, tuple(field.metadata), field)
    if here.item is not None and isinstance(part, int):
        return Place(here.item, (), None)
    return None


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _options(annotation: Any) -> tuple[Any, ...]:
    return (
        get_args(annotation)
        if get_origin(annotation) in (Union, types.UnionType)
        else (annotation,)
    )


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _phrase(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    options = _options(annotation)
    if len(options) > 1:
        return " or ".join(_phrase(option) for option in options)
    if get_origin(annotation) is Annotated:
        bare, *constraints = get_args(annotation)
        unpacked: list[Any] = []
        for constraint in constraints:
            unpacked += constraint.metadata if isinstance(constraint, FieldInfo) else [constraint]
        return _phrase(bare, tuple(unpacked))
    if get_origin(annotation) is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    if get_origin(annotation) is list:
        item = get_args(annotation)[0]
        return "a list of sections" if _is_section(item) else f"a list of {_phrase(item)}"
    if _is_section(annotation):
        return "a section of fields"
    return _constrained(_WORDS[annotation], metadata)


def _constrained(word: str, metadata: tuple[Any, ...]) -> str:
    bounds = []
    for constraint in metadata:
        for kind, attribute, sign in _COMPARISONS:
            if isinstance(constraint, kind):
                bounds.append(f"{sign} {getattr(constraint, attribute)}")
        if getattr(constraint, "pattern", None):
            # The schema's one pattern.
            return f"{word} of letters, digits, . _ - that does not start with a dot"
        if isinstance(constraint, annotated_types.MinLen):
            return f"non-empty {word}"
    return " ".join(filter(None, (word, " and ".join(bounds))))


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
