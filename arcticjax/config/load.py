"""A config file and `--set` overrides -> a RunConfig, or one report of everything wrong."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import ValidationError

from arcticjax.config import yaml_text
from arcticjax.config.checks import nearest
from arcticjax.config.fields import Path, Place, field_names, longest, place, root
from arcticjax.config.problem import Unknown
from arcticjax.config.schema import CROSS_FIELD, Root, RunConfig
from arcticjax.config.secrets import find_secret
from arcticjax.errors import ConfigError

_PART = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9]+")

Config = TypeVar("Config", bound=Root)


def load_config(path: str | FilePath, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a training run; see `load`."""
    return load(RunConfig, path, overrides)


def load(schema: type[Config], path: str | FilePath, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies overrides `a.b=c` in order, and validates the result.

    The value of an override is YAML; for a field of free text it is taken as it stands, unless it
    is quoted or null. A list is indexed as in `data.sources.0.path=x`. Paths stay as written.

    Raises:
        ConfigError: every problem of the file and of the overrides, each with file and line or
            override, dotted path, value, what was expected and the nearest valid name; or, before
            all others and without its value, the first that looks like a secret.
    """
    loading = _Loading(str(path), schema)
    values = loading.read(FilePath(path))
    _refuse_secrets(str(path), values)
    for override in overrides:
        dotted, _, raw = override.partition("=")
        _refuse_secrets(f"--set {dotted}", raw)
        loading.override(values, override)
    if not loading.readable:
        raise loading.error()
    for name in schema.model_fields:
        # `loss:` with every line below it commented out means its defaults, as does its absence;
        # an absent required section is reported by its missing fields.
        found = place((name,), schema)
        if values.get(name) is None and found is not None and found.section is not None:
            values[name] = {}
    config = loading.validate(values)
    if config is None:
        raise loading.error()
    assert isinstance(config, schema)
    return config


def dump_config(config: Root) -> str:
    """The whole config as YAML, defaults included; loading it gives an equal object."""
    return yaml_text.dump(config.model_dump())


def differences(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """The fields in which two configs differ: dotted path, value in `a`, value in `b`.

    Lists of unequal length, and sections that only one config has, are given whole.
    """
    return list(_differences((), a.model_dump(), b.model_dump()))


def _refuse_secrets(where: str, value: Any, path: Path = ()) -> None:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_secrets(where, item, (*path, key))
    elif isinstance(value, str) and (found := find_secret(value)) is not None:
        raise ConfigError(
            f"{': '.join(filter(None, (where, _dotted(path))))}: {found} looks like a secret, and "
            "the config is copied into the run's files; no field takes one. What needs a token "
            "reads it from the environment (HF_TOKEN)"
        )


def _differences(path: Path, a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(key, a[key], b[key]) for key in a]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(index, *both) for index, both in enumerate(zip(a, b, strict=True))]
    else:
        return [] if a == b else [(_dotted(path), a, b)]
    return [found for key, x, y in pairs for found in _differences((*path, key), x, y)]


@dataclasses.dataclass(frozen=True)
class _Problem:
    order: tuple[int, int]  # file lines first, then overrides as given
    where: str
    path: Path
    message: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.where, _dotted(self.path), self.message)))


class _Loading:
    """Where every value came from, and the problems found so far."""

    def __init__(self, file: str, schema: type[Root]) -> None:
        self.file = file
        self.readable = True
        self._schema = schema
        self._problems: list[_Problem] = []
        self._origins: dict[Path, tuple[tuple[int, int], str]] = {}
        self._written: dict[Path, str | None] = {}
        self._overrides = 0
        # Paths without a trustworthy value: no further complaint is made about them.
        self._settled: set[Path] = set()

    def error(self) -> ConfigError:
        entries = [str(problem) for problem in sorted(self._problems, key=lambda p: p.order)]
        if len(entries) == 1:
            return ConfigError(entries[0])
        return ConfigError(
            "\n".join([f"{len(entries)} problems in the config:", *(f"  {e}" for e in entries)])
        )

    def read(self, path: FilePath) -> dict[str, Any]:
        """The file as nested plain values; {} and not `readable` if it cannot be one."""
        message = None
        parsed = yaml_text.Parsed(None, {}, [])
        try:
            text = _text(path)
            parsed = yaml_text.parse(text)
        except ConfigError as error:
            message = str(error)
        for path_, spot in parsed.spots.items():
            self._origins[path_] = ((0, spot.line), f"{self.file}:{spot.line}")
            self._written[path_] = spot.written
        for note in parsed.notes:
            line = note.line or 0
            where = f"{self.file}:{line}" if line else self.file
            self._problems.append(_Problem((0, line), where, note.path, note.message))
        self._settle_invalid((), parsed.value)
        value = parsed.value
        if isinstance(value, dict):
            return value
        if message is None and value is None:
            message = "the file holds no fields; start from a file in configs/"
        elif message is None and not isinstance(value, yaml_text.Invalid):
            message = f"expected sections of `name: value` lines, got {_shown(value)}"
        if message is not None:
            self._problems.append(_Problem((0, 0), self.file, (), message))
        self.readable = False
        return {}

    def override(self, values: dict[str, Any], override: str) -> None:
        """Sets one value in place, or notes why not."""
        self._overrides += 1
        origin = ((1, self._overrides), f"--set {override}")

        def note(path: Path, message: str) -> None:
            self._problems.append(_Problem(*origin, path, message))

        dotted, equals, raw = override.partition("=")
        parts = dotted.strip().split(".")
        if not equals or not all(_PART.fullmatch(part) for part in parts):
            return note((), "expected PATH=VALUE, as in optimizer.learning_rate=1e-4")
        path = tuple(int(part) if part.isdigit() else part for part in parts)
        found = place(path, self._schema)
        if found is None:
            message, meant = _unknown(path, self._schema)
            if meant:
                self._settled.add(meant)
            return note(path, message)
        if not raw.strip() and not found.free_text:
            # YAML reads nothing as null: a shell variable that was not set would unset the field.
            hint = "; write null to unset it" if found.nullable else ""
            return note(path, f"expected {found.expected}, got nothing{hint}")
        value, notes = _override_value(found, raw)
        for problem in notes:
            note(path + problem.path, problem.message)
        refused = _put(values, path, value)
        if refused and self.readable:
            return note(path, refused)
        for known in [known for known in self._origins if known[: len(path)] == path]:
            del self._origins[known]
        self._settled -= {known for known in self._settled if known[: len(path)] == path}
        self._settle_invalid(path, value)
        self._origins[path] = origin
        self._written[path] = None
        return None

    def validate(self, values: dict[str, Any]) -> Root | None:
        """The config, or None with every problem noted."""
        try:
            config = self._schema.model_validate(values)
        except ValidationError as error:
            errors = error.errors(include_url=False)
        else:
            # Duplicate keys leave values that are valid in themselves.
            return None if self._problems else config
        cross = [problem for e in errors if e["type"] == CROSS_FIELD
                 for problem in e.get("ctx", {})["problems"]]  # fmt: skip
        if not cross:
            self._field_problems(values, [(e["type"], e["loc"]) for e in errors])
            partial = _Partial(root(self._schema), self._schema, (), values, self._settled)
            cross = self._schema.problems(partial)
        for path, message in cross:
            self._note(path, message)
        return None

    def _field_problems(
        self, values: dict[str, Any], errors: Sequence[tuple[str, tuple[int | str, ...]]]
    ) -> None:
        unknown = [(*longest(loc[:-1], self._schema), loc[-1]) for kind, loc in errors
                   if kind == "extra_forbidden"]  # fmt: skip
        for path in unknown:
            if not self._is_settled(path):
                message, meant = _unknown(path, self._schema)
                self._note(path, f"{message} (got {_shown(_get(values, path))})")
                if meant:
                    self._settled.add(meant)
        others = {longest(loc, self._schema): kind for kind, loc in errors
                  if kind != "extra_forbidden"}  # fmt: skip
        for path, kind in others.items():
            # A union reports each of its branches; the deepest report is the one to act on.
            deeper = any(o != path and o[: len(path)] == path for o in others)
            if deeper or self._is_settled(path):
                continue
            self._note(path, self._mismatch(path, kind, values))
            self._settled.add(path)

    def _mismatch(self, path: Path, kind: str, values: dict[str, Any]) -> str:
        found = place(path, self._schema)
        assert found is not None
        if kind == "missing":
            description = found.field.description if found.field else ""
            return f"required, and not given; expected {found.expected}. {description}".strip()
        value, written = _get(values, path), self._written.get(path)
        hint = ""
        if isinstance(value, str) and found.choices:
            close = nearest(value, found.choices)
            hint = f"; did you mean {close}?" if close else ""
        elif isinstance(value, bool) and found.free_text and written:
            return (
                f"expected {found.expected}, got {written}, which YAML reads as "
                f"{_shown(value)}; put it in quotes"
            )
        elif isinstance(value, int | float) and found.free_text:
            hint = "; put it in quotes"
        elif isinstance(value, str) and isinstance(yaml_text.parse(value).value, int | float):
            hint = "; remove the quotes"
        elif found.item is not None and not isinstance(value, list):
            hint = f"; write [{value}]" if isinstance(value, str) else ""
        return f"expected {found.expected}, got {_shown(value)}{hint}"

    def _note(self, path: Path, message: str) -> None:
        known = next(p for n in range(len(path), -1, -1)
                     if (p := path[:n]) in self._origins or not p)  # fmt: skip
        # The root's own line says nothing.
        order, where = self._origins[known] if known else ((0, 0), self.file)
        self._problems.append(_Problem(order, where, path, message))

    def _settle_invalid(self, path: Path, value: Any) -> None:
        if isinstance(value, yaml_text.Invalid):
            self._settled.add(path)
        elif isinstance(value, dict):
            for key, item in value.items():
                self._settle_invalid((*path, key), item)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                self._settle_invalid((*path, index), item)

    def _is_settled(self, path: Path) -> bool:
        return any(path[:n] in self._settled for n in range(len(path) + 1))


class _Partial:
    """A config some of whose fields are wrong: reading a wrong or missing one raises Unknown."""

    def __init__(
        self,
        here: Place,
        schema: type[Root],
        path: Path,
        values: dict[str, Any],
        wrong: set[Path],
    ) -> None:
        self._state = here, schema, path, values, wrong

    def __getattr__(self, name: str) -> Any:
        here, _, path, values, wrong = self._state
        assert here.section is not None
        field = here.section.model_fields[name]
        path = (*path, name)
        if path in wrong:
            raise Unknown
        if name not in values:
            if field.is_required():
                raise Unknown
            return field.get_default(call_default_factory=True)
        return self._read(path, values[name])

    def _read(self, path: Path, value: Any) -> Any:
        _, schema, _, _, wrong = self._state
        if path in wrong:
            raise Unknown
        found = place(path, schema)
        assert found is not None
        if isinstance(value, dict):
            return _Partial(found, schema, path, value, wrong)
        if isinstance(value, list):
            return [self._read((*path, index), item) for index, item in enumerate(value)]
        return value


def _text(path: FilePath) -> str:
    """The file's text. Raises ConfigError without the file's name."""
    try:
        if path.is_dir():
            files = sorted(p.name for p in path.glob("*.y*ml"))
            inside = f"; it holds {', '.join(files[:8])}" if files else ""
            raise ConfigError(f"is a folder, expected a YAML file{inside}")
        with path.open("rb") as stream:
            content = stream.read(yaml_text.MAX_BYTES + 1)
    except FileNotFoundError:
        try:
            siblings = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
        except OSError:
            raise ConfigError(f"no such file, and no folder {path.parent}") from None
        close = nearest(path.name, siblings)
        hint = f"; did you mean {path.with_name(close)}?" if close else ""
        raise ConfigError(f"no such file{hint}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot be read: {reason}") from None
    if len(content) > yaml_text.MAX_BYTES:
        raise ConfigError("is larger than 1 MB, so it is no config; data goes into data.sources")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"line {line} is not UTF-8 text; save the file as UTF-8") from None


def _override_value(found: Place, raw: str) -> tuple[Any, list[yaml_text.Note]]:
    stripped = raw.strip()
    quoted = len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "\"'"
    # A prompt such as `query: ` would be a mapping in YAML, and lose its space.
    text = found.free_text and found.item is None
    if text and not quoted and stripped not in ("null", "~"):
        return raw, []
    parsed = yaml_text.parse(raw)
    return parsed.value, parsed.notes


def _put(values: dict[str, Any], path: Path, value: Any) -> str | None:
    """Sets a value in nested values, making absent sections; else says why it cannot."""
    here: Any = values
    for depth, part in enumerate(path):
        above = _dotted(path[:depth])
        is_list, is_section = isinstance(here, list), isinstance(here, dict)
        if isinstance(part, int) and (not is_list or part >= len(here)):
            size = len(here) if is_list else 0
            return f"{above} has {size} entries to index; give the whole list: {above}=[...]"
        if isinstance(part, str) and not is_section:
            return f"{above} is {_shown(here)} in the file, not a section"
        if depth == len(path) - 1:
            here[part] = value
            return None
        if is_section and here.get(part) is None:
            here[part] = {} if isinstance(path[depth + 1], str) else []
        here = here[part]
    return None


def _get(values: Any, path: Path) -> Any:
    for part in path:
        values = values[part]
    return values


def _unknown(path: Path, schema: type[Root]) -> tuple[str, Path | None]:
    """What to say of a path that the schema lacks, and the path that was probably meant."""
    depth = next(n for n in range(len(path)) if place(path[: n + 1], schema) is None)
    above, part = path[:depth], path[depth]
    parent = place(above, schema)
    assert parent is not None
    if parent.section is None:
        below = "entries by number" if parent.item is not None else "nothing below it"
        return f"no such field; {_dotted(above)} has {below}", None
    names = list(parent.section.model_fields)
    close = nearest(str(part), names)
    if close:
        meant = (*above, close, *path[depth + 1 :])
        if place(meant, schema) is not None:
            return f"unknown field; did you mean {_dotted(meant)}?", meant
    elsewhere = [name for name in field_names(schema) if name.rpartition(".")[2] == path[-1]]
    if elsewhere:
        return f"unknown field; did you mean {elsewhere[0]}?", tuple(elsewhere[0].split("."))
    if close:
        return f"unknown field; did you mean {_dotted((*above, close))}?", (*above, close)
    return f"unknown field; {_dotted(above) or 'a config'} has {', '.join(names)}", None


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return f"a section with {', '.join(list(value)[:4])}" if value else "an empty section"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))
