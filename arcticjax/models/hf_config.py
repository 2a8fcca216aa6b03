"""Reads the content of a Hugging Face `config.json` strictly: what is read is checked, and every
problem is kept for one report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arcticjax.models.spec import Rotary

# What most families call the sizes of a spec; every one of them is a positive integer.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "type_vocab_size",
}

_REQUIRED = object()
# Beyond what any encoder has, so that arithmetic with what is read stays within its types.
_SIZE_LIMIT = 2**31
_NUMBER_LIMIT = 1e15


class ConfigReader:
    """The content of one file, and the `problems` found in it so far.

    A value with a problem is given as a harmless one, so that reading goes on.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.problems: list[str] = []

    def sizes(self, names: Mapping[str, str] = SIZES) -> dict[str, Any]:
        """The spec's fields by their keys in the file, with the norms' epsilon and the deviation of
        fresh weights under their usual keys."""
        fields: dict[str, Any] = {field: self.size(key) for key, field in names.items()}
        fields["layer_norm_epsilon"] = self.number("layer_norm_eps", 1e-12, below=1)
        fields["initializer_range"] = self.number("initializer_range", 0.02, below=1)
        return fields

    def size(self, key: str, *, least: int = 1, absent: int | None = None) -> int:
        """A whole number; required unless `absent` says what a missing key (or null) means."""
        value = self.content.get(key)
        if value is None and absent is not None:
            return absent
        if type(value) is int and least <= value < _SIZE_LIMIT:
            return value
        state = f"is {value!r}" if key in self.content else "is missing"
        self.problems.append(
            f"{key} {state}, expected a {'positive' if least else 'non-negative'} integer below "
            f"{_SIZE_LIMIT}"
        )
        return 1

    def number(
        self,
        key: str,
        absent: float,
        *,
        below: float = _NUMBER_LIMIT,
        within: Mapping[str, Any] | None = None,
    ) -> float:
        """A positive number `below` a limit; `within`: the part of the file to look in, if not all
        of it."""
        value = (self.content if within is None else within).get(key, absent)
        if type(value) in (int, float) and 0 < value < below:
            return float(value)
        self.problems.append(f"{key} is {value!r}, expected a number between 0 and {below:g}")
        return absent

    def fixed(self, key: str, *values: Any, absent: Any = _REQUIRED) -> None:
        """A setting that would change the forward pass and must have one of `values`; a missing key
        means `absent`, the first of them where it is not given."""
        value = self.content.get(key, values[0] if absent is _REQUIRED else absent)
        if value not in values:
            self.problems.append(f"{key} is {value!r}, only {values[0]!r} is supported")

    def rotary(self, theta: float, head_size: int, trained: int) -> Rotary:
        """Rotary positions, in transformers' newer form (`rope_parameters`) or its older one
        (`rope_theta`, `rope_scaling`).

        theta: where none is given. trained: positions before dynamic scaling begins.
        """
        key = "rope_parameters" if self.content.get("rope_parameters") else "rope_scaling"
        given = self.content.get(key) or {}
        if not isinstance(given, Mapping):
            self.problems.append(f"{key} is {given!r}, expected an object")
            return Rotary(theta)
        given = {"rope_theta": self.content.get("rope_theta", theta), **given}
        if given.get("partial_rotary_factor", 1.0) != 1.0:
            self.problems.append("partial_rotary_factor is not 1, which is not supported")
        theta = self.number("rope_theta", theta, within=given)
        kind = given.get("rope_type", given.get("type", "default"))
        if kind == "default":
            return Rotary(theta)
        factor = self.number("factor", 0.0, within=given)
        if kind == "linear":
            return Rotary(theta, divisor=factor)
        if kind == "dynamic":
            return Rotary(theta, factor=factor, trained_positions=trained)
        # Fixed NTK scaling of the original GTE code (https://kexue.fm/archives/9706, equation 6).
        if kind == "ntk" and given.get("mixed_b") is None:
            return Rotary(theta * factor, divisor=factor ** (2 / head_size))
        self.problems.append(
            f"rope_type is {kind!r}, known are default, linear, dynamic and ntk without mixed_b"
        )
        return Rotary(theta)


def rope_parameters(rotary: Rotary) -> dict[str, Any]:
    """Rotary positions in transformers' newer form."""
    if rotary.trained_positions is not None:
        return {"rope_type": "dynamic", "rope_theta": rotary.theta, "factor": rotary.factor}
    if rotary.divisor != 1:
        return {"rope_type": "linear", "rope_theta": rotary.theta, "factor": rotary.divisor}
    return {"rope_type": "default", "rope_theta": rotary.theta}
