"""Tables between Hugging Face's tensor names and ours, read both ways."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from arcticjax.errors import CheckpointError, ConfigError
from arcticjax.models.families import FAMILIES, ORIGINAL_PREFIXES, Family
from arcticjax.models.spec import ModelSpec, parameter_shapes
from arcticjax.models.tensor_table import Entry

# Beyond twice what the weights have: a weight file that lacks most of a small model is still told
# tensor by tensor.
_SPARE_NUMBERS = 1 << 20
LISTED = 12  # names of each kind in an error; a foreign checkpoint would list hundreds


def from_hf_state(spec: ModelSpec, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Builds the nested parameter dict (NumPy, float32, layers stacked) from a state dict.

    Names may be transformers' or the original code's, carry the prefix of a checkpoint with a head,
    and the old `LayerNorm.gamma/beta`. Raises CheckpointError naming every missing, unexpected or
    misshaped tensor.
    """
    family = FAMILIES[spec.family]
    found: dict[str, str] = {}
    unexpected = []
    for name in tensors:
        plain = _plain_name(name, spec.family)
        if plain in found:
            unexpected.append(f"{name} (stands beside {found[plain]})")
        found[plain] = name
    missing, misshaped = [], []
    shapes = parameter_shapes(spec)
    _check_numbers(shapes, tensors)
    params: dict[str, np.ndarray] = {}
    for entry in _table_of(spec, family, found):
        # Rows that a checkpoint does not have are scales that nothing reads.
        targets = [np.ones(shapes[path], np.float32) for path in entry.paths]
        params.update(zip(entry.paths, targets, strict=True))
        for hf_name, place in _tensors(spec, entry):
            name = found.pop(hf_name, None)
            parts = [entry.transform(target[place]) for target in targets]
            expected = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
            if name is None:
                missing.append(f"{hf_name} {expected}")
                continue
            tensor = np.asarray(tensors[name])
            if tensor.shape != expected or not _is_float(tensor.dtype):
                misshaped.append(
                    f"{name} is {tensor.dtype} {tensor.shape}, expected floats {expected}"
                )
                continue
            for target, part in zip(targets, np.split(tensor, len(targets)), strict=True):
                target[place] = entry.transform(part).astype(np.float32)
    unexpected += [name for plain, name in found.items() if not plain.startswith(family.unused)]
    if missing or unexpected or misshaped:
        raise CheckpointError(
            f"the weights do not fit a {spec.family} encoder of {spec.num_layers} layers and width "
            f"{spec.hidden_size}: "
            + "; ".join(
                f"{len(names)} {kind}: {', '.join(sorted(names)[:LISTED])}"
                + (" ..." if len(names) > LISTED else "")
                for kind, names in (
                    ("missing", missing),
                    ("unexpected", unexpected),
                    ("misshaped", misshaped),
                )
                if names
            )
            + ". Check that config.json and the weights belong to the same model."
        )
    return unflatten_dict(params, sep="/")


def _check_numbers(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Any]) -> None:
    """Refuses a config that asks for far more memory than the weights take, before it is taken."""
    wanted, there = sum(map(math.prod, shapes.values())), sum(map(np.size, tensors.values()))
    if wanted > 2 * there + _SPARE_NUMBERS:
        raise CheckpointError(
            f"the config describes {wanted:,} numbers, and the weights have {there:,}"
        )


def to_hf_state(
    spec: ModelSpec, params: Mapping[str, Any], *, original: bool = False
) -> dict[str, np.ndarray]:
    """Writes nested parameters as a state dict of contiguous NumPy arrays: no prefix, no pooler,
    dtype as given. `original`: with the names of the code that the family was published with, which
    go with the config.json of `to_original_config`, instead of transformers'.

    Raises CheckpointError if the parameters are not the spec's, ConfigError for a family that has
    no other names.
    """
    flat = cast("dict[str, Any]", flatten_dict(dict(params), sep="/"))
    shapes = parameter_shapes(spec)
    wrong = [
        f"{path} is {tuple(flat[path].shape) if path in flat else 'missing'}, "
        f"expected {shapes.get(path, 'nothing')}"
        for path in sorted(flat.keys() | shapes.keys())
        if path not in flat or path not in shapes or tuple(flat[path].shape) != shapes[path]
    ]
    if wrong:
        raise CheckpointError(
            f"the parameters are not those of the model being written: {'; '.join(wrong[:LISTED])}"
        )
    names = _original(spec) if original else FAMILIES[spec.family].native
    tensors = {}
    for entry in _of(spec, names.table):
        stacked = [np.asarray(flat[path]) for path in entry.paths]
        for hf_name, place in _tensors(spec, entry):
            parts = [entry.transform(array[place]) for array in stacked]
            whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
            tensors[hf_name] = np.ascontiguousarray(whole)
    return tensors


def to_original_config(spec: ModelSpec) -> dict[str, Any]:
    """The config.json for tensors written with `original`, without an `auto_map`: who runs the
    original code adds that of the repository they trust. Raises ConfigError as `to_hf_state`."""
    return _original(spec).write(spec)


def _original(spec: ModelSpec) -> Any:
    names = FAMILIES[spec.family].original
    if names is None:
        raise ConfigError(f"a {spec.family} encoder has no names but those of transformers")
    return names


def _table_of(spec: ModelSpec, family: Family, found: Iterable[str]) -> list[Entry]:
    """The table that most of the names are in."""
    known = [family.native, *([family.original] if family.original else [])]
    names = set(found)

    def matches(table: list[Entry]) -> int:
        return sum(name in names for entry in table for name, _ in _tensors(spec, entry))

    return max((_of(spec, one.table) for one in known), key=matches)


def _of(spec: ModelSpec, table: tuple[Entry, ...]) -> list[Entry]:
    """The table without the entries of arrays that a spec of these sizes does not have."""
    return [
        entry for entry in table if spec.type_vocab_size or "embeddings/type" not in entry.paths
    ]


def _tensors(spec: ModelSpec, entry: Entry) -> Iterator[tuple[str, Any]]:
    """The entry's tensors: name, and where it lies in our arrays."""
    if "{layer}" not in entry.hf_name:
        yield entry.hf_name, ...
        return
    for layer in range(entry.first_layer, spec.num_layers):
        yield entry.hf_name.format(layer=layer), layer


def _plain_name(name: str, family: str) -> str:
    plain = name.removeprefix(FAMILIES[family].prefix)
    plain = plain.removeprefix(ORIGINAL_PREFIXES.get(family, ""))
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if plain.endswith(old):
            plain = plain.removesuffix(old) + new
    return plain


def _is_float(dtype: np.dtype) -> bool:
    # bfloat16 of ml_dtypes has kind 'V'
    return dtype.kind == "f" or dtype.name == "bfloat16"
