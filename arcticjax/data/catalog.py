"""The sources of a run: tokenised once into a cache, small ones handled, seen as views."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from arcticjax.buckets import folder_here, is_address
from arcticjax.config.negatives import NegativesConfig
from arcticjax.config.schema import RunConfig, SourceConfig
from arcticjax.data import adapters, buckets, list_sources, stored
from arcticjax.data.bad_records import BadRecords
from arcticjax.data.list_views import ListView
from arcticjax.data.policy import Policy
from arcticjax.data.stored import StoredSource
from arcticjax.errors import ConfigError, DataError
from arcticjax.models.tokenizer import TextTokenizer

# Names of views that are put together from several sources.
MERGED = "merged"
ALL = "all"

View = TypeVar("View", "SourceView", ListView)

# Beside a text that stands alone.
_NO_QUERY = "-"

_log = logging.getLogger(__name__)


class SourceView:
    """One or more stored sources seen as one, records numbered through in their order.

    `weight` is relative to those of the other views, or None for a share by size.
    """

    def __init__(
        self, name: str, parts: Sequence[StoredSource], weight: float | None = None
    ) -> None:
        self.name = name
        self.parts = list(parts)
        self.weight = weight
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    @classmethod
    def merged(cls, name: str, views: Sequence[SourceView], weight: float | None) -> SourceView:
        """Several views as one."""
        return cls(name, [part for view in views for part in view.parts], weight)

    def describe(self) -> str:
        """Its size in words, for messages."""
        return f"{self.name} ({len(self)} pairs)"

    def __len__(self) -> int:
        return int(self._starts[-1])

    def query_lengths(self, records: np.ndarray) -> np.ndarray:
        """Own tokens of the queries of `records`, uint32."""
        return self._gather("query_lengths", records)

    def document_lengths(self, records: np.ndarray) -> np.ndarray:
        """Own tokens of the documents of `records`, uint32."""
        return self._gather("document_lengths", records)

    def query_ids(self, records: np.ndarray) -> np.ndarray:
        """Text ids of the queries of `records`, uint64."""
        return self._gather("query_ids", records)

    def document_ids(self, records: np.ndarray) -> np.ndarray:
        """Text ids of the documents of `records`, uint64."""
        return self._gather("document_ids", records)

    def read(self, records: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Token ids of the queries and documents of `records`; see `StoredSource.read`."""
        if len(self.parts) == 1:
            return self.parts[0].read(records)
        records = np.asarray(records, np.int64)
        empty = np.empty(0)
        queries, documents = [empty] * len(records), [empty] * len(records)
        for part, places, own in self._split(records):
            found = part.read(own)
            for place, query, document in zip(places.tolist(), *found, strict=True):
                queries[place], documents[place] = query, document
        return queries, documents

    def _gather(self, sidecar: str, records: np.ndarray) -> np.ndarray:
        records = np.asarray(records, np.int64)
        result = np.empty(len(records), stored.SIDECARS[sidecar])
        for part, places, own in self._split(records):
            result[places] = getattr(part, sidecar)[own]
        return result

    def _split(self, records: np.ndarray) -> Iterator[tuple[StoredSource, np.ndarray, np.ndarray]]:
        """For each part asked for: the part, places in `records`, and the part's own records."""
        if records.size and (records.min() < 0 or records.max() >= len(self)):
            raise IndexError(f"source {self.name!r} has records 0..{len(self) - 1}")
        part_of = np.searchsorted(self._starts, records, side="right") - 1
        for part in np.unique(part_of).tolist():
            places = np.flatnonzero(part_of == part)
            yield self.parts[part], places, records[places] - self._starts[part]


@dataclass(frozen=True)
class Catalog:
    """What a run draws from.

    fingerprint: hex digest of names, contents, order and weights: two catalogs that share it give
    the same draws. task_folder: the retrieval task of held-out docstrings, if any.
    notes: what was cut from their records, and from candidates where they have some.
    """

    views: list[Any]
    fingerprint: str
    task_folder: Path | None
    notes: list[str] = field(default_factory=list)


def open_sources(config: RunConfig, tokenizer: TextTokenizer) -> Catalog:
    """Opens all sources of a run, copying those in buckets and tokenising plain ones into the cache
    the first time.

    Several processes may call it at once on a shared disk. Raises DataError for unusable data and
    ConfigError where sources do not fit the settings (too small, a name used twice).
    """
    data = config.data
    cache = cache_folder(config)
    sources = [buckets.local(source, cache) for source in data.sources]
    task_folder = None
    if data.docstrings is not None:
        from arcticjax.data import docstrings  # its scan of installed packages is seldom wanted

        found = docstrings.extract(data.docstrings, cache / "docstrings", config.train.global_batch)
        sources += found.sources
        task_folder = found.task_folder
    _check_names(sources)
    if data.negatives is not None:
        return _open_lists(config, data.negatives, sources, cache, tokenizer, task_folder)
    opened = [open_cached(source, cache, tokenizer) for source in sources]
    views = [
        SourceView(source.name, [part], source.weight)
        for source, part in zip(sources, opened, strict=True)
    ]
    if data.stratified:
        views = _without_small(views, config.train.global_batch, data.small_sources)
    else:
        views = [SourceView(ALL, opened)]
        if len(views[0]) < config.train.global_batch:
            raise ConfigError(
                f"data.sources: all sources together hold {len(views[0])} pairs, fewer than "
                f"train.global_batch = {config.train.global_batch}; lower it to {len(views[0])} "
                "or add data"
            )
    notes = [
        f"{part.name}: {part.manifest['left_out']} records that are no pair of texts"
        for part in opened
        if part.manifest.get("left_out")
    ]
    return Catalog(views, _fingerprint(views), task_folder, notes)


def cache_folder(config: RunConfig) -> Path:
    """Where a run keeps the stored form of plain sources and the docstrings' task."""
    if config.data.cache is None and is_address(config.run.directory):
        return folder_here(config.run.directory) / "cache"
    return Path(config.data.cache or os.path.join(config.run.directory, "cache")).expanduser()


def _open_lists(
    config: RunConfig,
    negatives: NegativesConfig,
    sources: list[SourceConfig],
    cache: Path,
    tokenizer: TextTokenizer,
    task_folder: Path | None,
) -> Catalog:
    """The sources as queries with positives and hard negatives."""
    data = config.data
    policy = Policy.from_config(negatives, data.positives, config.run.seed)
    views, notes = [], []
    for source in sources:
        others = [other for other in sources if other is not source]
        found = list_sources.open_source(
            source, cache, tokenizer, lambda one: open_cached(one, cache, tokenizer), others
        )
        if config.loss.distillation is not None and not found.scored:
            raise DataError(
                f"source {source.name!r}: loss.distillation needs a teacher's scores, which its "
                "negatives or positives do not all have; give data.sources scores or candidates"
            )
        views.append(ListView(source.name, [found], policy, source.weight))
        if found.manifest.get("left_out"):
            notes.append(f"{source.name}: {found.manifest['left_out']} records that are not whole")
    notes += [
        f"{view.name}, {stage:.0%} of the run: {found}" if len(view.yields) > 1 else
        f"{view.name}: {found}"
        for view in views
        for stage, found in zip(policy.starts(), view.yields, strict=True)
    ]  # fmt: skip
    if data.stratified:
        views = _without_small(views, config.train.global_batch, data.small_sources)
    else:
        views = [ListView.merged(ALL, views, None)]
        if len(views[0]) < config.train.global_batch:
            raise ConfigError(
                f"train.global_batch: {config.train.global_batch} is more than the sources hold "
                f"after data.negatives: {views[0].describe()}; lower it, or cut less"
            )
    return Catalog(views, _fingerprint(views), task_folder, notes)


def open_cached(source: SourceConfig, cache: Path, tokenizer: TextTokenizer) -> StoredSource:
    """The stored form of a source: itself if it is one, else its copy in the cache, made if absent.

    The copy is keyed by the source's files (name, size, time), columns and tokenizer. Of a corpus
    (`adapters.corpus_of`) the documents are stored, each with the same short query.
    """
    path = Path(source.path).expanduser()
    # A manifest that is not ours, or is damaged, is reported where there is nothing else to read.
    if stored.has_own_manifest(path) or (
        (path / stored.MANIFEST).is_file() and not adapters.plain_files(path)
    ):
        found = stored.open_source(path)
        made_with = found.manifest["tokenizer"]["sha256"]
        if made_with != tokenizer.sha256:
            raise DataError(
                f"source {source.name!r}, {path}: tokenised with another tokenizer "
                f"({made_with[:12]}) than the model's ({tokenizer.sha256[:12]}); prepare it again "
                "or choose the model it was made for"
            )
        return found
    origin = adapters.identity(source)
    key = hashlib.sha256(
        json.dumps([stored.FORMAT_VERSION, origin, tokenizer.sha256]).encode()
    ).hexdigest()
    directory = cache / "sources" / f"{source.name}-{key[:16]}"
    if not directory.exists():
        _log.info("source %s: tokenising %s into %s", source.name, source.path, directory)
    records = BadRecords(source)
    return stored.write_source(
        directory,
        source.name,
        _unchanged(source, origin, records),
        tokenizer,
        origin=origin,
        licence=source.licence,
        language=source.language,
        left_out=lambda: records.left_out,
    )


def _unchanged(
    source: SourceConfig, origin: dict[str, object], records: BadRecords
) -> Iterator[tuple[str, str]]:
    """The pairs of a source; DataError at the end if its files changed while they were read."""
    alone = source.query == source.document
    for query, document in adapters.read_pairs(source, records):
        yield (_NO_QUERY if alone else query), document
    if adapters.identity(source) != origin:
        raise DataError(
            f"source {source.name!r}, {source.path}: changed while it was read; run again when it "
            "is complete"
        )


def _check_names(sources: list[SourceConfig]) -> None:
    names = [source.name for source in sources]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(
            f"data.sources: {', '.join(repeated)} is also the name of a docstrings source (they "
            "carry their package's name); rename it in data.sources"
        )


def _without_small(views: list[View], global_batch: int, policy: str) -> list[View]:
    """Views that can fill a global batch, after the small ones were merged or dropped."""
    small = [view for view in views if len(view) < global_batch]
    if not small:
        return views
    large = [view for view in views if len(view) >= global_batch]
    sizes = _some([view.describe() for view in small])
    if policy == "drop":
        if not large:
            raise ConfigError(
                f"data.small_sources = drop leaves no source: all have fewer pairs than "
                f"train.global_batch = {global_batch}: {sizes}; lower train.global_batch, or set "
                "data.small_sources to merge"
            )
        _log.warning(
            "dropped %d sources with fewer pairs than train.global_batch = %d: %s",
            len(small),
            global_batch,
            sizes,
        )
        return large
    if policy == "merge":
        return [*large, _merge(small, [view.name for view in large], global_batch, sizes)]
    raise ConfigError(
        f"data.small_sources: {len(small)} of {len(views)} sources have fewer pairs than "
        f"train.global_batch = {global_batch}: {sizes}. A global batch comes from one source and "
        "repeats no pair, so these can never fill one. Set data.small_sources to merge (they share "
        "one source) or drop (leave them out), or lower train.global_batch to "
        f"{min(len(view) for view in small)}"
    )


def _merge(small: list[View], taken: list[str], global_batch: int, sizes: str) -> View:
    if MERGED in taken:
        raise ConfigError(f"data.sources: the name {MERGED!r} is needed for merged small sources")
    weights = [view.weight for view in small if view.weight is not None]
    kind: Any = type(small[0])
    merged: View = kind.merged(MERGED, small, sum(weights) if weights else None)
    if len(merged) < global_batch:
        raise ConfigError(
            f"data.small_sources = merge: the small sources together hold {len(merged)} pairs, "
            f"fewer than train.global_batch = {global_batch}: {sizes}; lower train.global_batch to "
            f"{len(merged)}, add data, or set data.small_sources to drop"
        )
    return merged


def _fingerprint(views: Sequence[SourceView | ListView]) -> str:
    content = [
        [view.name, view.weight, [[part.name, part.fingerprint] for part in view.parts]]
        for view in views
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _some(names: list[str], most: int = 20) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
