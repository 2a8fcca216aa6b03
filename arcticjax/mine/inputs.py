"""What is mined: distinct queries and documents of each corpus, and which belong together.

Ids of texts ascend, so that a text's place stands for its id: documents of equal score come in the
order of their places. Tokens are those of the teacher's tokenizer: plain files are tokenised once
into a cache; a stored source must have been made with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qsl

import numpy as np

from arcticjax.config import InputConfig, MineConfig, SourceConfig
from arcticjax.data import adapters, catalog, stored
from arcticjax.data.candidates import IdKind
from arcticjax.errors import ConfigError, DataError
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.scoring import beir
from arcticjax.scoring.metrics import RELEVANT

BEIR = "beir:"
UNION = "union"


class Texts(Protocol):
    """Texts of one side.

    ids: distinct and ascending; uint64, or Python strings in an object array.
    """

    ids: np.ndarray

    def __len__(self) -> int: ...

    def tokens(self, places: np.ndarray) -> list[np.ndarray]:
        """Own token ids of the texts at `places`, uncut."""
        ...

    def texts(self, places: np.ndarray) -> list[str]:
        """The texts at `places`, to be read by people."""
        ...


@dataclass(frozen=True)
class Pool:
    """Queries and the documents they are compared with.

    positives of query q: places in `documents`, ascending, `positives[starts[q] : starts[q + 1]]`;
    every query has one. own_Q: the place of the document whose text is the query's, -1 = none.
    fingerprint: hex digest of all texts and of which belong together.
    """

    name: str
    sources: tuple[str, ...]
    kind: IdKind
    queries: Texts
    documents: Texts
    positives: np.ndarray
    positive_starts: np.ndarray
    own_Q: np.ndarray
    fingerprint: str


def inputs_of(config: MineConfig) -> list[InputConfig]:
    """The inputs of a config; a bare path is one, named by its last part."""
    if not isinstance(config.input, str):
        return config.input
    path = config.input.partition("?")[0].rstrip("/")
    name = path.rpartition(":")[2].rpartition("/")[2].partition(".")[0]
    cleaned = "".join(mark if mark.isalnum() and mark.isascii() else "_" for mark in name)
    return [InputConfig(name=cleaned[:128] or "input", path=config.input)]


def open_pools(config: MineConfig, cache: Path, tokenizer: TextTokenizer) -> list[Pool]:
    """Opens all inputs, tokenising plain files into `cache` the first time.

    Raises DataError for unusable data, ConfigError for inputs that cannot share a corpus.
    """
    inputs = inputs_of(config)
    for one in inputs:
        if one.corpus is not None and is_beir(one):
            raise ConfigError(
                f"input {one.name!r}: a BEIR folder brings its own corpus; remove corpus, or save "
                "its pairs as Parquet"
            )
    if config.corpus == "own":
        return [
            _beir_pool(one, tokenizer)
            if is_beir(one)
            else _stored_pool(one.name, [one], cache, tokenizer)
            for one in inputs
        ]
    for one in inputs:
        if is_beir(one):
            raise ConfigError(
                f"corpus: union, but input {one.name!r} is a BEIR folder, whose own ids may mean "
                "other documents elsewhere; leave it out, set corpus to own, or save its pairs as "
                "Parquet"
            )
    return [_stored_pool(UNION, inputs, cache, tokenizer)]


def is_beir(one: InputConfig) -> bool:
    """Whether an input is a BEIR folder."""
    return one.path.startswith(BEIR) or any(
        (Path(one.path).expanduser() / name).is_file() for name in beir.CORPUS_NAMES
    )


def pairs_of(one: InputConfig) -> SourceConfig:
    """The pairs of an input as a source."""
    return SourceConfig(name=one.name, path=one.path, query=one.query, document=one.document)


def _stored_pool(
    name: str, inputs: Sequence[InputConfig], cache: Path, tokenizer: TextTokenizer
) -> Pool:
    pairs = [_open(pairs_of(one), cache, tokenizer) for one in inputs]
    corpora = [
        _open(one, cache, tokenizer) for one in map(adapters.corpus_of, inputs) if one is not None
    ]
    view = catalog.SourceView(name, [*pairs, *corpora])
    # Records of pairs come first.
    paired = np.arange(sum(map(len, pairs)))
    query_ids, query_records, query_of = np.unique(
        view.query_ids(paired), return_index=True, return_inverse=True
    )
    document_ids, document_records, document_of = np.unique(
        view.document_ids(np.arange(len(view))), return_index=True, return_inverse=True
    )
    positives, starts = _grouped(
        query_of, document_of[: len(paired)], len(query_ids), len(document_ids)
    )
    # Ids are hashes of the texts, so this is the same for every teacher's tokenizer.
    digest = hashlib.sha256()
    for array in (query_ids, document_ids, positives, starts):
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    return Pool(
        name=name,
        sources=tuple(one.name for one in inputs),
        kind="text",
        queries=_StoredTexts(view, query_ids, query_records, 0, tokenizer),
        documents=_StoredTexts(view, document_ids, document_records, 1, tokenizer),
        positives=positives,
        positive_starts=starts,
        own_Q=_places(query_ids, document_ids),
        fingerprint=digest.hexdigest(),
    )


def _open(one: SourceConfig, cache: Path, tokenizer: TextTokenizer) -> stored.StoredSource:
    path = Path(one.path).expanduser()
    if stored.has_own_manifest(path):
        found = stored.open_source(path)
        made_with = found.manifest["tokenizer"]["sha256"]
        if made_with != tokenizer.sha256:
            origin = found.manifest["origin"].get("path", "the files it was made from")
            raise DataError(
                f"input {one.name!r}, {path}: holds token ids of another tokenizer "
                f"({made_with[:12]}) than the teacher's ({tokenizer.sha256[:12]}), and no texts; "
                f"mine from {origin} instead: ids of texts are the same"
            )
        return found
    return catalog.open_cached(one, cache, tokenizer)


def _beir_pool(one: InputConfig, tokenizer: TextTokenizer) -> Pool:
    folder, _, options = one.path.removeprefix(BEIR).partition("?")
    given = dict(parse_qsl(options, keep_blank_values=True))
    split = given.pop("split", None)
    if given:
        raise ConfigError(
            f"input {one.name!r}: unknown option {next(iter(given))!r} in {one.path!r}; known: "
            "split"
        )
    task = beir.load_task(Path(folder).expanduser(), split)

    # Equal documents are one: the first id by code point stands for all.
    by_text: dict[str, str] = {}
    for own, text in zip(task.document_ids, task.documents, strict=True):
        by_text[text] = min(own, by_text.get(text, own))
    documents = sorted((own, text) for text, own in by_text.items())
    del by_text
    # Places are wanted of few documents: judged ones, and those that are a query's own text.
    texts = dict(zip(task.query_ids, task.queries, strict=True))
    judged = {
        own for grades in task.qrels.values() for own, grade in grades.items() if grade >= RELEVANT
    }
    text_of = {
        own: text
        for own, text in zip(task.document_ids, task.documents, strict=True)
        if own in judged
    }
    looked_up = {*text_of.values(), *task.queries}
    places = {text: place for place, (_, text) in enumerate(documents) if text in looked_up}
    # Equal queries share their positives.
    positives: dict[str, set[int]] = {}
    for query, grades in task.qrels.items():
        relevant = {places[text_of[own]] for own, grade in grades.items() if grade >= RELEVANT}
        positives.setdefault(texts[query], set()).update(relevant)
    query_ids = sorted(query for query in task.qrels if positives[texts[query]])
    rows = [sorted(positives[texts[query]]) for query in query_ids]
    return Pool(
        name=one.name,
        sources=(one.name,),
        kind="own",
        queries=_ListedTexts(query_ids, [texts[own] for own in query_ids], tokenizer),
        documents=_ListedTexts(
            [own for own, _ in documents], [text for _, text in documents], tokenizer
        ),
        positives=np.array([place for row in rows for place in row], np.int64),
        positive_starts=np.cumsum([0, *map(len, rows)]),
        own_Q=np.array([places.get(texts[own], -1) for own in query_ids], np.int64),
        fingerprint=_digest(((own, texts[own]) for own in query_ids), documents, rows),
    )


def _digest(*lists: Iterable[object]) -> str:
    """Hex digest of several lists as one line of JSON, which is never there whole."""
    digest = hashlib.sha256(b"[")
    for number, rows in enumerate(lists):
        digest.update(b", [" if number else b"[")
        for place, row in enumerate(rows):
            digest.update(f"{', ' if place else ''}{json.dumps(row)}".encode())
        digest.update(b"]")
    digest.update(b"]")
    return digest.hexdigest()


class _StoredTexts:
    """One side of stored sources; `records`: one that holds each text. side: 0 query, 1 document"""

    def __init__(
        self,
        view: catalog.SourceView,
        ids: np.ndarray,
        records: np.ndarray,
        side: int,
        tokenizer: TextTokenizer,
    ) -> None:
        self.ids = ids
        self._view, self._records, self._side = view, records, side
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, places: np.ndarray) -> list[np.ndarray]:
        return self._view.read(self._records[places])[self._side]

    def texts(self, places: np.ndarray) -> list[str]:
        return [self._tokenizer.decode(ids) for ids in self.tokens(places)]


class _ListedTexts:
    """Texts in memory."""

    def __init__(self, ids: list[str], texts: list[str], tokenizer: TextTokenizer) -> None:
        self.ids = np.array(ids, object)
        self._texts = texts
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, places: np.ndarray) -> list[np.ndarray]:
        return self._tokenizer.encode(self.texts(places))

    def texts(self, places: np.ndarray) -> list[str]:
        return [self._texts[place] for place in places.tolist()]


def _grouped(
    rows: np.ndarray, values: np.ndarray, rows_total: int, values_total: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values of each row, ascending and laid end to end, and where each row starts."""
    keys = np.unique(rows.astype(np.int64) * values_total + values)
    counts = np.bincount(keys // values_total, minlength=rows_total)
    return keys % values_total, np.concatenate([[0], np.cumsum(counts)])


def _places(wanted: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Place of each value in the ascending `among`, -1 where it is not there."""
    places = np.minimum(np.searchsorted(among, wanted), len(among) - 1)
    return np.where(among[places] == wanted, places, -1).astype(np.int64)
