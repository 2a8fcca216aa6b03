"""Loads a published encoder with the contract its texts go through, running none of its code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from arcticjax.config import RunConfig
from arcticjax.config.contract import MIN_LENGTH, TextContract
from arcticjax.errors import CheckpointError, ConfigError
from arcticjax.models.hf_mapping import from_hf_state
from arcticjax.models.resolve import resolve, revision_of
from arcticjax.models.safe_weights import digest, read_weights, weight_files
from arcticjax.models.spec import ModelSpec, Pooling
from arcticjax.models.tokenizer import TOKENIZER_FILE, TextTokenizer

MAX_JSON_BYTES = 2**20

# The three modules that an embedding here is made of, by the last part of their class name.
MODULES = ("Transformer", "Pooling", "Normalize")

# sentence-transformers' older booleans and newer names for what we can compute, and for what we
# cannot.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_POOLINGS: dict[str, Pooling] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
# Where sentence-transformers looks for the document prompt, in its order (encode_document).
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


@dataclass(frozen=True)
class Pretrained:
    """An encoder as loaded: `params` is a nested dict of NumPy float32 arrays, `sha256` that of the
    weight file (of the shards' names and hashes when there are several), `folder` where it was
    found, `revision` the hub's commit where it came from there."""

    spec: ModelSpec
    params: dict[str, Any]
    contract: TextContract
    tokenizer_file: Path
    folder: Path
    name: str
    sha256: str
    revision: str | None = None


@dataclass(frozen=True)
class _Settings:
    """What a folder says of its texts; None where it is silent."""

    encoder_folder: Path
    pooling: Pooling | None
    query_prompt: str
    document_prompt: str
    query_length: int | None
    document_length: int | None
    lower_case: bool


@dataclass(frozen=True)
class Description:
    """What a folder says of its model: the sizes as used (layers left out, pooling chosen) and as
    stored, and the contract of its texts."""

    spec: ModelSpec
    stored: ModelSpec
    contract: TextContract
    settings: _Settings


def contract_options(config: RunConfig) -> dict[str, Any]:
    """What a config says of its texts, as options of `load_pretrained` and `random_start`."""
    return {
        "pooling": config.model.pooling,
        "query_prompt": config.model.query_prompt,
        "document_prompt": config.model.document_prompt,
        "query_length": config.data.query_length,
        "document_length": config.data.document_length,
    }


def load_pretrained(
    name_or_folder: str | Path,
    *,
    pooling: Pooling | None = None,
    keep_layers: int | None = None,
    tokenizer: str | Path | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    query_length: int | None = None,
    document_length: int | None = None,
) -> Pretrained:
    """Loads a Hugging Face or sentence-transformers folder, by path or by name (see `resolve`).

    Options replace what the folder says; `keep_layers` keeps the first layers only; for `tokenizer`
    see `open_tokenizer`. Lengths count tokens, special tokens and prompt included. Vectors are
    L2-normalised whether or not the folder has a Normalize module: cosine similarity is the same.

    Raises ConfigError for an option that does not fit the model, and CheckpointError for a folder
    that is damaged, unsafe or holds something that is not computed here.
    """
    name = str(name_or_folder)
    folder = resolve(name)
    described = describe_folder(
        folder,
        name,
        pooling=pooling,
        keep_layers=keep_layers,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        query_length=query_length,
        document_length=document_length,
    )
    settings, spec = described.settings, described.stored
    source = settings.encoder_folder

    opened = open_tokenizer(source, spec, tokenizer)
    if settings.lower_case and _tells_case_apart(opened):
        raise CheckpointError(
            f"{folder}: sentence_bert_config.json asks for do_lower_case, which its tokenizer.json "
            f"does not do; save the tokenizer with a lower-casing normalizer"
        )

    files = weight_files(source)
    tensors = read_weights(files)
    with _naming(source):
        params = from_hf_state(spec, tensors)
    del tensors
    if keep_layers is not None:
        params = {**params, "layers": _first(params["layers"], keep_layers)}
    return Pretrained(
        spec=described.spec,
        params=params,
        contract=described.contract,
        tokenizer_file=opened.file,
        folder=folder,
        name=name,
        sha256=digest(files),
        revision=revision_of(folder),
    )


def describe_folder(
    folder: Path,
    name: str,
    *,
    pooling: Pooling | None = None,
    keep_layers: int | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    query_length: int | None = None,
    document_length: int | None = None,
) -> Description:
    """What `load_pretrained` would load from a local folder, without its weights.

    name: the model, for messages. Raises as `load_pretrained` does.
    """
    settings = _read_settings(folder)
    source = settings.encoder_folder
    with _naming(source):
        spec = ModelSpec.from_hf(read_json(source / "config.json", required=True))
    chosen = pooling or settings.pooling
    if chosen is None:
        raise ConfigError(
            f"{name}: a plain Hugging Face folder does not say how token vectors become one; set "
            f"model.pooling to 'cls' (as Arctic-Embed), 'mean' or 'last'"
        )
    if keep_layers is not None and not 1 <= keep_layers <= spec.num_layers:
        raise ConfigError(
            f"model.keep_layers: {keep_layers} is not within 1 to the {spec.num_layers} layers "
            f"of {name}"
        )
    contract = TextContract(
        query_prompt=settings.query_prompt if query_prompt is None else query_prompt,
        document_prompt=settings.document_prompt if document_prompt is None else document_prompt,
        query_length=_length("query", query_length, settings.query_length, spec, name),
        document_length=_length("document", document_length, settings.document_length, spec, name),
        pooling=chosen,
    )
    used = dataclasses.replace(
        spec, pooling=chosen, num_layers=spec.num_layers if keep_layers is None else keep_layers
    )
    return Description(used, spec, contract, settings)


def open_tokenizer(folder: Path, spec: ModelSpec, given: str | Path | None = None) -> TextTokenizer:
    """The tokenizer of an encoder's folder, or the one `given` for it (`model.tokenizer`).

    Raises ConfigError for a given one, CheckpointError for the folder's, that does not match the
    weights: an id is past their table, or the given one has other tokens than the folder's. A table
    may have more rows than there are tokens.
    """
    tokenizer = TextTokenizer.from_file(folder if given is None else given)
    problem = None
    if tokenizer.vocab_size > spec.vocab_size:
        problem = (
            f"its highest token id is {tokenizer.vocab_size - 1}, the token table of {folder} has "
            f"{spec.vocab_size} rows"
        )
    elif given is not None and (folder / TOKENIZER_FILE).is_file():
        own = TextTokenizer.from_file(folder)
        if not tokenizer.same_tokens(own):
            problem = f"{own.file}, beside the weights, gives other tokens"
    if problem is None:
        return tokenizer
    if given is None:
        raise CheckpointError(
            f"{tokenizer.file}: {problem}; tokenizer and weights are of different models"
        )
    raise ConfigError(
        f"model.tokenizer: {tokenizer.file} does not match the weights: {problem}. Leave "
        "model.tokenizer out to take the one beside the weights"
    )


def read_json(path: Path, *, required: bool, kind: type = dict) -> Any:
    """The JSON object (or list) in a small file; an empty one when absent and not required.

    Raises CheckpointError for a file that is missing, too large, malformed or of another kind.
    """
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path}: missing; the folder is not a complete model")
        return kind()
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, kind):
        raise CheckpointError(f"{path}: expected a JSON {'object' if kind is dict else 'list'}")
    return content


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Puts the folder before an error of code that does not know it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def _read_settings(folder: Path) -> _Settings:
    modules = read_json(folder / "modules.json", required=False, kind=list)
    places = _module_folders(folder, modules) if modules else {"Transformer": folder}
    encoder_folder = places["Transformer"]
    pooling, includes_prompt = None, True
    if "Pooling" in places:
        pooling, includes_prompt = _read_pooling(places["Pooling"] / "config.json", encoder_folder)
    prompts_file = folder / "config_sentence_transformers.json"
    prompts = read_json(prompts_file, required=False).get("prompts") or {}
    if not isinstance(prompts, Mapping) or not all(
        isinstance(prompt, str) for prompt in prompts.values() if prompt is not None
    ):
        raise CheckpointError(f"{prompts_file}: 'prompts' is not a mapping of names to texts")
    query_prompt = prompts.get("query") or ""
    document_prompt = next((prompts[key] for key in _DOCUMENT_PROMPTS if prompts.get(key)), "")
    if not includes_prompt and (query_prompt or document_prompt):
        raise CheckpointError(
            f"{folder}: its pooling leaves the prompt out (include_prompt is false), which is not "
            f"supported"
        )

    transformer = read_json(encoder_folder / "sentence_bert_config.json", required=False)
    task = transformer.get("transformer_task", "feature-extraction")
    if task != "feature-extraction" or transformer.get("query_expansion"):
        raise CheckpointError(
            f"{encoder_folder / 'sentence_bert_config.json'}: asks for more than token embeddings "
            f"(transformer_task {task!r}, query_expansion), which is not supported"
        )
    # Only what sentence-transformers' own files cannot say is taken from ours.
    ours = _read_own_lengths(folder / "arcticjax.json")
    longest = transformer.get("max_seq_length")
    if longest is not None and (type(longest) is not int or longest < MIN_LENGTH):
        raise CheckpointError(
            f"{encoder_folder / 'sentence_bert_config.json'}: max_seq_length is {longest!r}, not a "
            f"whole number of {MIN_LENGTH} or more"
        )
    if longest is None:
        tokenizer_settings = read_json(encoder_folder / "tokenizer_config.json", required=False)
        longest = tokenizer_settings.get("model_max_length")
    query_length = transformer.get("query_length") or ours.get("query_length")
    document_length = transformer.get("document_length") or ours.get("document_length")
    return _Settings(
        encoder_folder=encoder_folder,
        pooling=pooling,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        query_length=_whole(query_length, longest),
        document_length=_whole(document_length, longest),
        lower_case=bool(transformer.get("do_lower_case")),
    )


def _read_own_lengths(file: Path) -> dict[str, int | None]:
    """The lengths of queries and documents that the export wrote down, in tokens."""
    contract = read_json(file, required=False).get("contract", {})
    if not isinstance(contract, dict):
        raise CheckpointError(f"{file}: 'contract' is not a JSON object")
    lengths = {name: contract.get(name) for name in ("query_length", "document_length")}
    for name, length in lengths.items():
        if length is not None and (type(length) is not int or length < 1):
            raise CheckpointError(
                f"{file}: contract.{name} is {length!r}, not a positive whole number"
            )
    return lengths


def _module_folders(folder: Path, modules: list[Any]) -> dict[str, Path]:
    file = folder / "modules.json"
    places: dict[str, Path] = {}
    for module in modules:
        if not isinstance(module, dict):
            raise CheckpointError(f"{file}: an entry is not a JSON object")
        type_name = str(module.get("type", ""))
        kind = type_name.rsplit(".", 1)[-1]
        ours = type_name.startswith("sentence_transformers.") and kind in MODULES
        if not ours or kind in places:
            raise CheckpointError(
                f"{file}: module {type_name!r} is not supported; a model is one Transformer, one "
                f"Pooling and at most one Normalize of sentence_transformers"
            )
        path = PurePosixPath(str(module.get("path", "")))
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointError(f"{file}: module path {str(path)!r} is outside the folder")
        places[kind] = folder / path
    if list(places) not in (list(MODULES), list(MODULES[:2])):
        raise CheckpointError(
            f"{file}: modules are {', '.join(places) or 'none'}; expected Transformer, Pooling "
            f"and, if wanted, Normalize, in this order"
        )
    return places


def _read_pooling(file: Path, encoder_folder: Path) -> tuple[Pooling, bool]:
    content = read_json(file, required=True)
    modes = content.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _POOLING_FLAGS.items() if content.get(flag)]
    elif isinstance(modes, str):
        modes = [modes]
    if not isinstance(modes, list) or len(modes) != 1 or str(modes[0]) not in _POOLINGS:
        raise CheckpointError(
            f"{file}: pooling {modes!r} is not supported; known are exactly one of "
            f"{', '.join(_POOLINGS)}"
        )
    width = content.get("embedding_dimension", content.get("word_embedding_dimension"))
    sizes = read_json(encoder_folder / "config.json", required=True)
    hidden = sizes.get("hidden_size", sizes.get("n_embd"))  # the latter in NomicBERT's older form
    if width is not None and width != hidden:
        raise CheckpointError(
            f"{file}: width {width} differs from hidden_size {hidden} in config.json"
        )
    return _POOLINGS[modes[0]], content.get("include_prompt", True) is not False


def _whole(*values: Any) -> int | None:
    """The first positive whole number (transformers writes 1e30 for 'no limit')."""
    for value in values:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**31:
            return int(value)
    return None


def _length(
    side: Literal["query", "document"],
    asked: int | None,
    stored: int | None,
    spec: ModelSpec,
    name: str,
) -> int:
    if asked is None:
        return min(stored or spec.max_positions, spec.max_positions)
    if not 3 <= asked <= spec.max_positions:
        raise ConfigError(
            f"data.{side}_length: {asked} tokens, but {name} takes 3 to {spec.max_positions} "
            f"(special tokens and prompt included)"
        )
    return asked


def _tells_case_apart(tokenizer: TextTokenizer) -> bool:
    upper, lower = tokenizer.encode(["A Text IN Capitals", "a text in capitals"])
    return not np.array_equal(upper, lower)


def _first(stacked: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The first `count` layers of every array, layers on axis 0; copied, so the rest can be
    freed."""
    return {
        key: _first(value, count) if isinstance(value, Mapping) else value[:count].copy()
        for key, value in stacked.items()
    }
