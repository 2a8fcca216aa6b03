"""YAML text <-> plain values, with the line of every value and nothing executed or expanded."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import yaml

MAX_BYTES = 1_000_000
# No config is nested deeper; the parser's recursion must not be the limit.
_MAX_DEPTH = 32

_TAG = "tag:yaml.org,2002:"
_ALIAS = "!alias"
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)")
_BOOL = re.compile(r"(?i:yes|no|true|false|on|off)")
_NULL = re.compile(r"~|null|Null|NULL|")

Path = tuple[str | int, ...]


class Invalid:
    """Stands where a value could not be read; the problem is already noted."""

    def __repr__(self) -> str:
        return "(unreadable)"


INVALID = Invalid()


@dataclasses.dataclass(frozen=True)
class Note:
    """A problem of the text itself, at a line (from 1) and, where known, a path."""

    line: int | None
    path: Path
    message: str


@dataclasses.dataclass(frozen=True)
class Spot:
    """Where a value stands in the text, and how it was written if it is a plain scalar."""

    line: int
    written: str | None


@dataclasses.dataclass(frozen=True)
class Parsed:
    """`value` is None for a text without a document, INVALID for one that does not parse."""

    value: Any
    spots: dict[Path, Spot]
    notes: list[Note]


def parse(text: str) -> Parsed:
    """Reads one YAML document; never raises for what the text holds.

    YAML 1.1 as PyYAML reads it, but numbers are decimal only, `1e-5` is a number, and there are no
    dates, aliases, merges or tags of Python objects. Duplicate keys are noted; the last one counts.
    """
    spots: dict[Path, Spot] = {}
    notes: list[Note] = []
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        notes.append(_syntax_note(error))
        return Parsed(INVALID, spots, notes)
    finally:
        if loader is not None:
            loader.dispose()
    value = None if root is None else _value(root, (), spots, notes)
    return Parsed(value, spots, notes)


def dump(values: dict[str, Any]) -> str:
    """YAML text that `parse` reads back as equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Loader(yaml.SafeLoader):
    """Composes nodes only; an alias becomes a marked scalar, never a copy of its anchor."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (PyYAML's own way)

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            return yaml.ScalarNode(_ALIAS, event.anchor, event.start_mark, event.end_mark)
        if self._depth >= _MAX_DEPTH:
            # Reading on would take PyYAML time that grows with the square of the depth.
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {_MAX_DEPTH} levels; no field is",
                problem_mark=self.peek_event().start_mark,
            )
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Dumper(yaml.SafeDumper):
    """Quotes what either PyYAML or `parse` would take for something other than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> Any:
        # PyYAML folds exotic line breaks into plain ones unless the text is double-quoted.
        style = None if data.isprintable() else '"'
        return self.represent_scalar(_TAG + "str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
for _kind, _pattern in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT)):
    _anchored = re.compile(f"(?:{_pattern.pattern})\\Z")
    _Loader.add_implicit_resolver(_TAG + _kind, _anchored, None)
    _Dumper.add_implicit_resolver(_TAG + _kind, _anchored, None)


def _value(node: Any, path: Path, spots: dict[Path, Spot], notes: list[Note]) -> Any:
    line = node.start_mark.line + 1
    plain = isinstance(node, yaml.ScalarNode) and not node.style
    spots[path] = Spot(line, node.value if plain else None)
    if isinstance(node, yaml.ScalarNode):
        value = _scalar(node)
        if isinstance(value, Note):
            notes.append(dataclasses.replace(value, line=line, path=path))
            return INVALID
        return value
    expected = "seq" if isinstance(node, yaml.SequenceNode) else "map"
    if node.tag != _TAG + expected:
        notes.append(Note(line, path, _tag_message(node.tag)))
        return INVALID
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, index), spots, notes) for index, item in enumerate(node.value)]
    values: dict[str, Any] = {}
    first: dict[str, int] = {}
    for key_node, item in node.value:
        key, key_line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
            shown = f"`{key}`" if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
            message = f"{shown} is no field name; field names are plain words"
            notes.append(Note(key_line, path, message))
            continue
        if key in first:
            message = f"given twice, first on line {first[key]}; keep one of them"
            notes.append(Note(key_line, (*path, key), message))
        first.setdefault(key, key_line)
        values[key] = _value(item, (*path, key), spots, notes)
        spots[(*path, key)] = dataclasses.replace(spots[(*path, key)], line=key_line)
    return values


def _scalar(node: Any) -> Any:
    text, kind = node.value, node.tag.removeprefix(_TAG)
    if node.tag == _ALIAS:
        return Note(None, (), f"aliases are not read (*{text}); write the value itself")
    if kind in ("str", "null"):
        return text if kind == "str" else None
    try:
        if kind == "bool":
            return {"yes": True, "true": True, "on": True, "no": False, "false": False,
                    "off": False}[text.lower()]  # fmt: skip
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except (ValueError, KeyError):
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        return Note(None, (), f"cannot read `{shown}` as {kind}")
    return Note(None, (), _tag_message(node.tag))


def _tag_message(tag: str) -> str:
    shown = tag.replace(_TAG, "!!")
    return f"the tag {shown} is not read; write a plain value, quoted if it starts with !"


def _syntax_note(error: yaml.YAMLError) -> Note:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        what = error.problem or error.context or "not YAML"
        if "'\\t'" in what:
            what = "a tab where YAML allows only spaces; replace tabs by spaces"
        elif "single document" in (error.context or ""):
            what = "a second document starts here (---); a config is one document"
        elif error.context:
            what = f"not YAML: {what} ({error.context})"
        elif type(error) is not yaml.MarkedYAMLError:  # that one is raised above, in our words
            what = f"not YAML: {what}"
        return Note(mark.line + 1 if mark else None, (), what)
    if isinstance(error, yaml.reader.ReaderError):
        return Note(
            None,
            (),
            f"not a text file: character {error.character!r} at position {error.position}",
        )
    return Note(None, (), f"not YAML: {error}")
