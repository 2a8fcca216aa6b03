"""What a config trains on, without weights and, where it is not at hand, without data.

The sizes of the model come from its preset, its folder, or, for the published encoders that
Arctic-Embed starts from, from a table here. Lengths of texts come from stored sources where all of
them are on this machine, else from a stated distribution.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arcticjax import errors
from arcticjax.config import RunConfig
from arcticjax.data import assemble, catalog, layout, list_pipeline, stored
from arcticjax.data.candidates import MANIFEST
from arcticjax.data.draw import Draw, Drawn
from arcticjax.data.list_views import Selected
from arcticjax.export.source import CHECKPOINTS, open_source
from arcticjax.models.pretrained import contract_options, describe_folder
from arcticjax.models.resolve import WHEELS, resolve
from arcticjax.models.spec import PRESETS, ModelSpec, Pooling
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.step import program as programs

# Published encoders with exactly the sizes of a preset: what the models of arXiv 2405.05374 and
# 2412.04506 start from, and those models, by their cards and config.json.
PUBLISHED = {
    "Snowflake/snowflake-arctic-embed-xs": "xs",
    "Snowflake/snowflake-arctic-embed-s": "s",
    "Snowflake/snowflake-arctic-embed-m": "m",
    "Snowflake/snowflake-arctic-embed-m-v1.5": "m-v1.5",
    "Snowflake/snowflake-arctic-embed-m-long": "m-long",
    "Snowflake/snowflake-arctic-embed-l": "l",
    "Snowflake/snowflake-arctic-embed-m-v2.0": "m-v2",
    "Snowflake/snowflake-arctic-embed-l-v2.0": "l-v2",
    "sentence-transformers/all-MiniLM-L6-v2": "xs",
    "intfloat/e5-small-unsupervised": "s",
    "intfloat/e5-base-unsupervised": "m",
    "google-bert/bert-base-uncased": "m",
    "intfloat/e5-large-unsupervised": "l",
    "nomic-ai/nomic-embed-text-v1-unsupervised": "m-long",
    "Alibaba-NLP/gte-multilingual-mlm-base": "m-v2",
    "BAAI/bge-m3-retromae": "l-v2",
    "answerdotai/ModernBERT-base": "modernbert-base",
    "answerdotai/ModernBERT-large": "modernbert-large",
}

# Tokens of uncut texts, special tokens included, of 30,000 pairs from Python docstrings: queries
# mean 29.9; documents mean 228, median 116, 90th percentile 535.
QUERY_MEAN, DOCUMENT_MEAN = 30.0, 228.0
# Logarithmic spread. Documents: of a lognormal with that mean and median, sqrt(2 ln(228 / 116)); it
# puts the 90th percentile at 514. Queries: chosen.
QUERY_SPREAD, DOCUMENT_SPREAD = 0.5, 1.16

_BATCHES = 4  # of a stand-in source


@dataclass(frozen=True)
class StandIn:
    """A source of texts that have lengths and no content, with as much of the interface of
    `catalog.SourceView` as shapes and layout need."""

    name: str
    query_tokens: np.ndarray
    document_tokens: np.ndarray
    weight: float | None = None

    def __len__(self) -> int:
        return len(self.query_tokens)

    def query_lengths(self, records: np.ndarray) -> np.ndarray:
        """Own tokens of the queries of `records`."""
        return self.query_tokens[records]

    def document_lengths(self, records: np.ndarray) -> np.ndarray:
        """Own tokens of the documents of `records`."""
        return self.document_tokens[records]

    def query_ids(self, records: np.ndarray) -> np.ndarray:
        """Every query is another."""
        return np.asarray(records, np.uint64)

    def document_ids(self, records: np.ndarray) -> np.ndarray:
        """Every document is another."""
        return np.asarray(records, np.uint64)


@dataclass(frozen=True)
class ListStandIn:
    """A source of queries with several documents each, lengths alone: as much of the interface of
    `list_views.ListView` as shapes and layout need. Every document is another."""

    name: str
    query_tokens: np.ndarray
    document_tokens: np.ndarray
    documents: int
    weight: float | None = None

    def __len__(self) -> int:
        return len(self.query_tokens)

    def select(self, records: np.ndarray, epoch: int, progress: float) -> Selected:
        """The queries of `records`, each with documents of its own."""
        documents = np.asarray(records)[:, None] * self.documents + np.arange(self.documents)
        return Selected(
            np.asarray(records, np.uint64),
            self.query_tokens[records],
            documents,
            np.zeros(documents.shape, np.float32),
            documents[:, :1],
        )

    def document_lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Own tokens of documents."""
        return self.document_tokens[numbers]

    def document_ids(self, numbers: np.ndarray) -> np.ndarray:
        """Every document is another."""
        return np.asarray(numbers, np.uint64)


@dataclass(frozen=True)
class Workload:
    """A config's model and data as far as they decide what is compiled.

    total_steps: of the run, None where only the data could tell. notes: what was assumed. guide:
    sizes of the model of `loss.guide`.
    """

    config: RunConfig
    spec: ModelSpec
    views: Sequence[Any]
    draw: Draw
    sides: Mapping[Any, assemble.Template]
    total_steps: int | None
    notes: list[str]
    guide: ModelSpec | None = None


@dataclass(frozen=True)
class Load:
    """What a step has to do, on average over sampled steps.

    tokens: real ones of all devices; squares: sum of the squared lengths of their texts;
    microbatches: of a device (as many as the fullest needs), each of so many rows; at_once: share
    of steps in which a rung of the ladder encodes all of a device's rows; fill: real tokens /
    slots.
    """

    tokens: float
    squares: float
    microbatches: float
    rows: float
    at_once: float
    fill: float


def describe(config: RunConfig, lengths: tuple[float, float] | None = None) -> Workload:
    """The workload of a config. lengths: mean tokens of queries and documents to assume, whether or
    not the data is at hand. Raises ConfigError where the model's sizes cannot be told."""
    notes: list[str] = []
    spec, prompts, tokenizer = _model(config, notes)
    sides = {
        side: assemble.Template(0, _prompt(prompts[side], tokenizer, notes), 0, longest)
        for side, longest in (
            ("query", config.data.query_length),
            ("document", config.data.document_length),
        )
    }
    views: Sequence[Any]
    real = lengths is None and tokenizer is not None and _is_stored(config)
    if real:
        assert tokenizer is not None
        views = catalog.open_sources(config, tokenizer).views
        notes.append(f"lengths: of the {len(views)} stored sources")
    else:
        means = lengths or (QUERY_MEAN, DOCUMENT_MEAN)
        views = [_stand_in(config, means, sides)]
        notes.append(
            f"lengths: assumed, lognormal with means {means[0]:g} (queries) and {means[1]:g} "
            "(documents) tokens before they are cut; give your own by --lengths, or stored sources"
        )
    draw = programs.make_draw(config, views)
    steps = config.train.total_steps or (draw.steps_per_epoch if real else None)
    return Workload(config, spec, views, draw, sides, steps, notes, _guide(config, notes))


def expected_load(workload: Workload, shapes: layout.Shapes, samples: int = 3) -> Load:
    """What steps spread over the first epoch have to do, dealt and packed as training does it."""
    found = []
    last = workload.draw.steps_per_epoch - 1
    for step in sorted({int(step) for step in np.linspace(0, last, samples)}):
        drawn = workload.draw.at(step)
        texts = _texts(workload, drawn, shapes.devices)
        rows = max(layout.pack(one, shapes.row_length, shapes.slots)[3] for one in texts)
        fits, _, encoded = shapes.rung(rows)
        microbatches = 1 if fits else -(-rows // shapes.rows)
        every = np.concatenate(texts).astype(np.float64)
        slots = shapes.devices * encoded * shapes.row_length
        found.append(
            (
                every.sum(),
                (every**2).sum(),
                microbatches,
                encoded / microbatches,
                fits,
                every.sum() / slots,
            )
        )
    return Load(*(float(mean) for mean in np.mean(found, axis=0)))


def _texts(workload: Workload, drawn: Drawn, devices: int) -> list[np.ndarray]:
    """Lengths as encoded of the texts of each device."""
    view, sides = workload.views[drawn.source], workload.sides
    if workload.config.data.negatives is not None:
        lists = list_pipeline.batch_lists(
            view, drawn.records, drawn.epoch, 0.0, sides["query"], sides["document"]
        )
        shared = workload.config.loss.in_batch_negatives
        dealt = list_pipeline.deal(lists, devices, shared=shared)
        return [
            np.concatenate([lists.query_lengths_B[queries], lists.lengths_U[own]])
            for queries, own in zip(dealt.queries_Nb, dealt.documents, strict=True)
        ]
    records = drawn.records
    queries = sides["query"].lengths(view.query_lengths(records))
    documents = sides["document"].lengths(view.document_lengths(records))
    dealt = layout.deal(
        view.query_ids(records), view.document_ids(records), queries, documents, devices
    )
    return [
        np.concatenate([queries[pairs], documents[own]])
        for pairs, own in zip(dealt.pairs_Nb, dealt.documents, strict=True)
    ]


def _model(
    config: RunConfig, notes: list[str]
) -> tuple[ModelSpec, dict[str, str], TextTokenizer | None]:
    """Sizes, prompts, and the tokenizer where it is on this machine."""
    model, data = config.model, config.data
    prompts = {"query": model.query_prompt or "", "document": model.document_prompt or ""}
    name, folder = model.init or "", None
    if model.preset is not None:
        spec = dataclasses.replace(
            PRESETS[model.preset], pooling=model.pooling or PRESETS[model.preset].pooling
        )
    elif (folder := _folder(name)) is not None:
        described = describe_folder(
            folder, name, keep_layers=model.keep_layers, **contract_options(config)
        )
        spec, contract = described.spec, described.contract
        prompts = {"query": contract.query_prompt, "document": contract.document_prompt}
        folder = described.settings.encoder_folder
    elif name in PUBLISHED:
        spec = PRESETS[PUBLISHED[name]]
        spec = dataclasses.replace(
            spec,
            pooling=model.pooling or spec.pooling,
            num_layers=min(model.keep_layers or spec.num_layers, spec.num_layers),
        )
        notes.append(
            f"model: {name} is not on this machine; its sizes are those of {spec_name(spec)}"
        )
    else:
        raise errors.ConfigError(
            f"model.init: {name!r} is not on this machine, and its sizes are not known; give its "
            "folder, or plan with a preset of its sizes (--set model.init=null --set "
            "model.preset=m --set model.tokenizer=none). Known without a folder: "
            f"{', '.join(PUBLISHED)}"
        )
    longest = max(data.query_length, data.document_length)
    if longest > spec.max_positions:
        raise errors.ConfigError(
            f"data.query_length / data.document_length: {longest} tokens, but the model takes "
            f"{spec.max_positions} at most"
        )
    place = Path(model.tokenizer).expanduser() if model.tokenizer else folder
    found = place is not None and place.exists()
    return spec, prompts, TextTokenizer.from_file(place) if found and place else None


def _guide(config: RunConfig, notes: list[str]) -> ModelSpec | None:
    guide = config.loss.guide
    if guide is None:
        return None
    spec = encoder_sizes("loss.guide.model", guide.model, guide.pooling, notes)[0]
    notes.append(f"guide: {guide.model}, {spec_name(spec)}, encodes every text too")
    return spec


def encoder_sizes(
    field: str, name: str, pooling: Pooling | None, notes: list[str]
) -> tuple[ModelSpec, tuple[int, int]]:
    """Sizes of a finished encoder, and how many tokens of a query and of a document it takes.

    field: of the config, for messages. Raises ConfigError where they cannot be told.
    """
    folder = _folder(name)
    if folder is not None and (folder / CHECKPOINTS).is_dir():
        source = open_source(folder)
        spec, contract = source.spec, source.contract
    elif folder is not None:
        described = describe_folder(folder, name, pooling=pooling)
        spec, contract = described.spec, described.contract
    elif name in PUBLISHED:
        spec = PRESETS[PUBLISHED[name]]
        spec = dataclasses.replace(spec, pooling=pooling or spec.pooling)
        longest = min(spec.max_positions, 512)
        notes.append(
            f"{field}: {name} is not on this machine; its sizes are those of {spec_name(spec)}, "
            f"its texts {longest} tokens"
        )
        return spec, (longest, longest)
    else:
        raise errors.ConfigError(
            f"{field}: {name!r} is not on this machine, and its sizes are not known; give its "
            f"folder. Known without a folder: {', '.join(PUBLISHED)}"
        )
    return spec, (contract.query_length, contract.document_length)


def spec_name(spec: ModelSpec) -> str:
    """The sizes of a model in a few words."""
    return (
        f"{spec.num_layers} layers of {spec.hidden_size}, {spec.num_heads} heads, "
        f"{spec.parameter_count():,} parameters"
    )


def _folder(name: str) -> Path | None:
    """A model's folder if it is on this machine; nothing is fetched."""
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        return folder.resolve()
    if name in WHEELS:
        import importlib.util

        if importlib.util.find_spec(WHEELS[name].package) is not None:
            return resolve(name)
    return None


def _prompt(prompt: str, tokenizer: TextTokenizer | None, notes: list[str]) -> np.ndarray:
    if tokenizer is not None:
        return tokenizer.encode_prompt(prompt)
    words = len(re.findall(r"\w+|[^\w\s]", prompt))
    if words:
        notes.append(f"prompt: {prompt!r} is counted as {words} tokens, its words and marks")
    return np.zeros(words, np.int32)


def _is_stored(config: RunConfig) -> bool:
    """Whether every source is in stored form on this machine, and with its candidates."""
    data = config.data
    if any(
        source.candidates and not (Path(source.candidates).expanduser() / MANIFEST).is_file()
        for source in data.sources
    ):
        return False
    return data.docstrings is None and all(
        (Path(source.path).expanduser() / stored.MANIFEST).is_file() for source in data.sources
    )


def _stand_in(
    config: RunConfig, means: tuple[float, float], sides: Mapping[Any, Any]
) -> StandIn | ListStandIn:
    random = np.random.default_rng(config.run.seed)
    queries = _BATCHES * config.train.global_batch

    def own(mean: float, spread: float, side: str, count: int) -> np.ndarray:
        tokens = random.lognormal(np.log(mean) - spread**2 / 2, spread, count)
        return np.maximum(np.rint(tokens) - sides[side].overhead, 1).astype(np.uint32)

    query_tokens = own(means[0], QUERY_SPREAD, "query", queries)
    negatives = config.data.negatives
    if negatives is None:
        documents = own(means[1], DOCUMENT_SPREAD, "document", queries)
        return StandIn("stand-in", query_tokens, documents)
    width = config.data.positives + negatives.count
    documents = own(means[1], DOCUMENT_SPREAD, "document", queries * width)
    return ListStandIn("stand-in", query_tokens, documents, width)
