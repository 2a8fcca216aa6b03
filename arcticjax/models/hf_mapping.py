"""One table between Hugging Face's tensor names and ours, read both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from arcticjax.errors import CheckpointError
from arcticjax.models.spec import ModelSpec, parameter_shapes

LISTED = 12  # names of each kind in an error; a foreign checkpoint would list hundreds


class Entry(NamedTuple):
    """One kind of tensor: `{layer}` in the name is the index on the leading axis of our array.

    `transform` turns either side's tensor into the other's, so it must be its own inverse.
    """

    hf_name: str
    path: str
    transform: Callable[[np.ndarray], np.ndarray]


def _same(tensor: np.ndarray) -> np.ndarray:
    return tensor


def _dense(hf_name: str, path: str) -> Iterator[Entry]:
    # torch.nn.Linear stores [out, in]
    yield Entry(f"{hf_name}.weight", f"{path}/kernel", np.transpose)
    yield Entry(f"{hf_name}.bias", f"{path}/bias", _same)


def _norm(hf_name: str, path: str) -> Iterator[Entry]:
    yield Entry(f"{hf_name}.weight", f"{path}/scale", _same)
    yield Entry(f"{hf_name}.bias", f"{path}/bias", _same)


_LAYER = "encoder.layer.{layer}"
BERT_TABLE: tuple[Entry, ...] = (
    Entry("embeddings.word_embeddings.weight", "embeddings/token", _same),
    Entry("embeddings.position_embeddings.weight", "embeddings/position", _same),
    Entry("embeddings.token_type_embeddings.weight", "embeddings/type", _same),
    *_norm("embeddings.LayerNorm", "embeddings/norm"),
    *_dense(f"{_LAYER}.attention.self.query", "layers/attention/query"),
    *_dense(f"{_LAYER}.attention.self.key", "layers/attention/key"),
    *_dense(f"{_LAYER}.attention.self.value", "layers/attention/value"),
    *_dense(f"{_LAYER}.attention.output.dense", "layers/attention/output"),
    *_norm(f"{_LAYER}.attention.output.LayerNorm", "layers/attention/norm"),
    *_dense(f"{_LAYER}.intermediate.dense", "layers/mlp/up"),
    *_dense(f"{_LAYER}.output.dense", "layers/mlp/down"),
    *_norm(f"{_LAYER}.output.LayerNorm", "layers/mlp/norm"),
)

# Tensors that may be present and are not used: a constant of old files, the dense pooler, and the
# heads of BertForPreTraining.
_DROPPED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
_DROPPED_PREFIX = "cls."


def from_hf_state(spec: ModelSpec, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Builds the nested parameter dict (NumPy, float32, layers stacked) from a BERT state dict.

    Names may carry the `bert.` prefix and the old `LayerNorm.gamma/beta`. Raises CheckpointError
    naming every missing, unexpected or misshaped tensor.
    """
    found: dict[str, str] = {}
    unexpected = []
    for name in tensors:
        plain = _plain_name(name)
        if plain in found:
            unexpected.append(f"{name} (stands beside {found[plain]})")
        found[plain] = name
    missing, misshaped = [], []
    shapes = parameter_shapes(spec)
    params: dict[str, np.ndarray] = {}
    for entry in BERT_TABLE:
        target = np.empty(shapes[entry.path], np.float32)
        params[entry.path] = target
        for hf_name, place in _tensors(spec, entry):
            name = found.pop(hf_name, None)
            expected = entry.transform(target[place]).shape
            if name is None:
                missing.append(f"{hf_name} {expected}")
                continue
            tensor = np.asarray(tensors[name])
            if tensor.shape != expected or not _is_float(tensor.dtype):
                misshaped.append(
                    f"{name} is {tensor.dtype} {tensor.shape}, expected floats {expected}"
                )
                continue
            target[place] = entry.transform(tensor).astype(np.float32)
    unexpected += [
        name
        for plain, name in found.items()
        if plain not in _DROPPED and not plain.startswith(_DROPPED_PREFIX)
    ]
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


def to_hf_state(spec: ModelSpec, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Writes nested parameters as a BERT state dict of contiguous NumPy arrays: no prefix, no
    pooler, dtype as given. Raises CheckpointError if the parameters are not the spec's."""
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
    tensors = {}
    for entry in BERT_TABLE:
        stacked = np.asarray(flat[entry.path])
        for hf_name, place in _tensors(spec, entry):
            tensors[hf_name] = np.ascontiguousarray(entry.transform(stacked[place]))
    return tensors


def _tensors(spec: ModelSpec, entry: Entry) -> Iterator[tuple[str, Any]]:
    """The entry's tensors: name, and where it lies in our array."""
    if "{layer}" not in entry.hf_name:
        yield entry.hf_name, ...
        return
    for layer in range(spec.num_layers):
        yield entry.hf_name.format(layer=layer), layer


def _plain_name(name: str) -> str:
    plain = name.removeprefix("bert.")
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if plain.endswith(old):
            plain = plain.removesuffix(old) + new
    return plain


def _is_float(dtype: np.dtype) -> bool:
    # bfloat16 of ml_dtypes has kind 'V'
    return dtype.kind == "f" or dtype.name == "bfloat16"
