"""Stored lists of a run's sources: from mined candidates, columns of negatives, known layouts.

pairs + candidates   data.sources.N.candidates: a folder of `arcticjax.data.candidates`
columns              query, positives, negatives and scores in one record:
                     sentence-transformers triplets and n-tuples, BGE and Tevatron JSONL
beir:, msmarco:, arctictraining:   see `arcticjax.data.training_sets`

Documents may be pieces of larger ones, their parents, by a column that names these.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from arcticjax.config.schema import SourceConfig
from arcticjax.data import adapters, lists, training_sets
from arcticjax.data.bad_records import BadRecords
from arcticjax.data.candidates import CandidateFolder, Group, open_candidates
from arcticjax.data.lists import ListWriter, StoredLists
from arcticjax.data.stored import StoredSource, has_own_manifest, text_id
from arcticjax.data.stored import open_source as open_stored
from arcticjax.errors import DataError
from arcticjax.models.tokenizer import TextTokenizer

_READ = 4096
# Number of a document that was not seen, and of one without text.
_NOT_FOUND, _NO_TEXT = -2, -1

_log = logging.getLogger(__name__)


@dataclass
class Entry:
    """Lists of one query while its records are read: numbers of documents and their scores."""

    positives: dict[int, float] = field(default_factory=dict)
    candidates: dict[int, float] = field(default_factory=dict)


def open_source(
    source: SourceConfig,
    cache: Path,
    tokenizer: TextTokenizer,
    pairs: Callable[[SourceConfig], StoredSource],
    others: Sequence[SourceConfig] = (),
) -> StoredLists:
    """The stored lists of a source: in the cache, made if absent.

    pairs: opens the stored pairs of a source. others: the run's other sources, where candidates are
    looked for that were mined from several sources together. Raises DataError naming what cannot be
    read, or candidates that belong to other data.
    """
    folder = None if source.candidates is None else open_candidates(source.candidates)
    origin = {
        "columns": [source.query, source.document, source.negatives, source.scores],
        "files": _identity(source),
        "candidates": folder and folder.fingerprint,
        "others": [],
    }
    group = None if folder is None else folder.group_of(source.name)
    if group is not None and group.kind == "text":
        shared = [other for other in others if other.name in group.sources]
        origin["others"] = [_identity(other) for other in shared]
    else:
        shared = []
    corpora = [one for one in map(adapters.corpus_of, (source, *shared)) if one is not None]
    if corpora:
        origin["corpora"] = [_identity(one) for one in corpora]
    if source.parents:
        origin["parents"] = [one.parents for one in (source, *shared)]
    key = hashlib.sha256(
        json.dumps([lists.FORMAT_VERSION, origin, tokenizer.sha256]).encode()
    ).hexdigest()
    directory = cache / "lists" / f"{source.name}-{key[:16]}"
    if not directory.exists():
        _log.info("source %s: writing its lists into %s", source.name, directory)

    def fill(writer: ListWriter) -> None:
        if folder is not None and group is not None:
            if group.kind == "own":
                _from_own_ids(writer, source, folder, group)
            else:
                pools = [pairs(one) for one in (source, *shared, *corpora)]
                numbers = _from_text_ids(writer, source, folder, group, pools)
                for one in (source, *shared):
                    _add_parents(writer, one, numbers)
            return
        if training_sets.knows(source.path):
            records = training_sets.read(source, tokenizer, writer)
        elif _is_stored(source):
            records = _stored_records(pairs(source), writer)
        else:
            records = _column_records(source, writer)
        _write_entries(writer, records)

    return lists.write(directory, source.name, tokenizer, fill)


def _is_stored(source: SourceConfig) -> bool:
    return has_own_manifest(Path(source.path).expanduser())


def _identity(source: SourceConfig) -> Any:
    """What the texts of a source depend on, as JSON."""
    if training_sets.knows(source.path):
        return training_sets.identity(source)
    if _is_stored(source):
        return open_stored(Path(source.path).expanduser()).fingerprint
    return adapters.identity(source)


def _stored_records(pool: StoredSource, writer: ListWriter) -> Iterator[training_sets.Record]:
    """Records of stored pairs, which have no negatives."""
    writer.left_out = pool.manifest.get("left_out", 0)
    for start in range(0, len(pool), _READ):
        records = np.arange(start, min(start + _READ, len(pool)))
        ids = zip(
            pool.query_ids[records].tolist(), pool.document_ids[records].tolist(), strict=True
        )
        for (query_id, document_id), query, document in zip(ids, *pool.read(records), strict=True):
            document = writer.tokens("document", document_id, document.copy())
            yield training_sets.Record(
                writer.tokens("query", query_id, query.copy()), [(document, math.nan)], []
            )


def columns(source: SourceConfig) -> dict[str, str]:
    """The columns that a source of columns needs, and the fields that name them."""
    found = {source.query: "query", source.document: "document"}
    for name in ("negatives", "scores", "parents"):
        found |= dict.fromkeys(getattr(source, name), name)
    return found


@dataclass(frozen=True)
class _Listed:
    """A record of columns: its positives and then its negatives; scores NaN and parents None where
    there are none. absent: entries without text."""

    query: str
    texts: list[str]
    scores: list[float]
    parents: list[str | None]
    positives: int
    absent: int


def _column_records(source: SourceConfig, writer: ListWriter) -> Iterator[training_sets.Record]:
    """Records of plain files and datasets libraries, by the columns of the config."""
    records, absent = BadRecords(source), 0
    for where, record in adapters.read_records(source, columns(source), records):
        try:
            found = _listed(source, record, where)
        except DataError as problem:
            records.bad(problem)
            continue
        records.good()
        absent += found.absent
        documents = [writer.document(text) for text in found.texts]
        for document, parent in zip(documents, found.parents, strict=True):
            writer.parent(document, parent)
        scored = list(zip(documents, found.scores, strict=True))
        cut = found.positives
        yield training_sets.Record(writer.query(found.query), scored[:cut], scored[cut:])
    records.end()
    writer.left_out = records.left_out
    if absent:
        _log.info("source %s: %d null or empty documents passed over", source.name, absent)


def _listed(source: SourceConfig, record: Mapping[str, Any], where: str) -> _Listed:
    """The values of a record; DataError for what cannot be used. Where a query has fewer documents
    than columns or places, those left over are null or empty."""
    (query,) = lists.checked_texts([record[source.query]], where)
    sides = [
        [text for column in columns for text in _texts(record[column])]
        for columns in ([source.document], source.negatives)
    ]
    flat = [text for side in sides for text in side]
    there = [text is not None for text in flat]
    texts = lists.checked_texts(itertools.compress(flat, there), where)
    positives = sum(text is not None for text in sides[0])
    if not positives:
        raise DataError(f"{where}: column {source.document!r} holds no document")
    of = f"for {positives} documents and {len(texts) - positives} negatives"
    scores: list[float] = [math.nan] * len(texts)
    if source.scores:
        given = _aligned([_values(record[column]) for column in source.scores], there)
        if len(given) != len(texts):
            # A missing list and a list of nothing say the same.
            given = [one for one in given if one is not None]
        if len(given) != len(texts):
            raise DataError(
                f"{where}: {len(given)} scores {of}; there must be one for each, documents first"
            )
        scores = _numbers(given, where)
    parents: list[str | None] = [None] * len(texts)
    if source.parents:
        given = _aligned([_values(record[column]) for column in source.parents], there)
        if len(given) != len(texts):
            raise DataError(
                f"{where}: {len(given)} parents {of}; there must be one for each, documents first"
            )
        parents = _parents(given, where)
    return _Listed(query, texts, scores, parents, positives, len(there) - len(texts))


def _aligned(columns: list[list[Any]], there: list[bool]) -> list[Any]:
    """Values of several columns, without those of absent documents if they have one too."""
    values = list(itertools.chain.from_iterable(columns))
    return list(itertools.compress(values, there)) if len(values) == len(there) else values


def _values(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _texts(value: Any) -> list[Any]:
    """A text, a document with title and text, or a list of these, as texts; None for null and
    empty ones."""
    plain = (
        training_sets.titled(one) if isinstance(one, dict) and "text" in one else one
        for one in _values(value)
    )
    return [None if isinstance(one, str) and not one.strip() else one for one in plain]


def _numbers(values: list[Any], where: str) -> list[float]:
    for one in values:
        if isinstance(one, bool) or not isinstance(one, int | float) or not math.isfinite(one):
            raise DataError(f"{where}: the score {one!r} is not a number")
    return [float(one) for one in values]


def _parents(values: list[Any], where: str) -> list[str | None]:
    """Names of parents, None where a document stands alone."""
    for one in values:
        if one is not None and (isinstance(one, bool) or not isinstance(one, int | str)):
            raise DataError(f"{where}: the parent {one!r} is no text or whole number")
    return [None if one is None or one == "" else str(one) for one in values]


def _add_parents(writer: ListWriter, source: SourceConfig, numbers: dict[int, int]) -> None:
    """Notes the parents of the documents of pairs that are in the lists; numbers: by text id."""
    if not source.parents:
        return
    if _is_stored(source):
        raise DataError(
            f"source {source.name!r}: parents, but the stored source {source.path} holds none; "
            "give the files that it was made from as path, their ids are the same"
        )
    needed = {source.document: "document", source.parents[0]: "parents"}
    records = BadRecords(source)
    for where, record in adapters.read_records(source, needed, records):
        try:
            (text,) = lists.checked_texts([record[source.document]], where)
            (parent,) = _parents([record[source.parents[0]]], where)
        except DataError as problem:
            records.bad(problem)
            continue
        records.good()
        number = numbers.get(text_id(text))
        if number is not None:
            writer.parent(number, parent)


def _write_entries(writer: ListWriter, records: Iterable[training_sets.Record]) -> None:
    """Writes lists; records of one query become one, so that a positive of any of them is none of
    its negatives."""
    entries: dict[int, Entry] = {}
    for record in records:
        entry = entries.setdefault(record.query, Entry())
        for known, fresh in (
            (entry.positives, record.positives),
            (entry.candidates, record.candidates),
        ):
            for document, score in fresh:
                known.setdefault(document, score)
    for query in range(len(entries)):
        entry = entries[query]
        # Unscored candidates stay as listed: that is their rank.
        candidates = list(entry.candidates.items())
        if not any(math.isnan(score) for _, score in candidates):
            candidates.sort(key=lambda one: -one[1])
        writer.lists(
            list(entry.positives),
            list(entry.positives.values()),
            [document for document, _ in candidates],
            [score for _, score in candidates],
        )


def _from_text_ids(
    writer: ListWriter,
    source: SourceConfig,
    folder: CandidateFolder,
    group: Group,
    pools: Sequence[StoredSource],
) -> dict[int, int]:
    """Lists that name documents by the ids of their texts, which stored pairs hold (the source's
    are the first); the documents' numbers by id."""
    writer.left_out = pools[0].manifest.get("left_out", 0)
    own = np.unique(pools[0].query_ids)
    needed = _named_ids(folder, group, own)
    if needed is None:
        raise DataError(
            f"source {source.name!r}: {folder.directory} holds candidates for none of its "
            f"{len(own)} queries; it was mined from other data: mine again"
        )
    numbers = np.full(len(needed), -1, np.int64)
    _, first = np.unique(pools[0].query_ids, return_index=True)
    query_places = dict(zip(pools[0].query_ids[first].tolist(), first.tolist(), strict=True))
    for pool in pools:
        ids, first = np.unique(pool.document_ids, return_index=True)
        places = np.minimum(np.searchsorted(needed, ids), len(needed) - 1)
        wanted = (needed[places] == ids) & (numbers[places] < 0)
        ids, first, places = ids[wanted], first[wanted], places[wanted]
        for start in range(0, len(ids), _READ):
            some = slice(start, start + _READ)
            _, bodies = pool.read(first[some])
            for place, identity, body in zip(
                places[some].tolist(), ids[some].tolist(), bodies, strict=True
            ):
                numbers[place] = writer.tokens("document", identity, body.copy())
    if (numbers < 0).any():
        raise DataError(
            f"source {source.name!r}: {folder.directory} names {(numbers < 0).sum()} documents of "
            f"{len(needed)} that the run's sources do not hold; list all sources it was mined from "
            f"({', '.join(group.sources)}) in data.sources, unchanged and with their corpus, or "
            "mine again"
        )
    for part in folder.batches(group):
        queries = np.flatnonzero(np.isin(part.query_ids, own))
        if not len(queries):
            continue
        # What only other sources' queries name is not looked for, and not read below either.
        candidates, positives = (
            numbers[np.minimum(np.searchsorted(needed, ids), len(needed) - 1)]
            for ids in (part.candidate_ids, part.positive_ids)
        )
        identities = part.query_ids[queries].tolist()
        tokens, _ = pools[0].read(np.array([query_places[one] for one in identities]))
        for query, identity, body in zip(queries.tolist(), identities, tokens, strict=True):
            writer.tokens("query", identity, body.copy())
            _write_list(writer, part, query, positives, candidates)
    return dict(zip(needed.tolist(), numbers.tolist(), strict=True))


def _named_ids(folder: CandidateFolder, group: Group, queries: np.ndarray) -> np.ndarray | None:
    """The distinct ids, ascending, of documents in the lists of some queries; None where there is
    none of the queries. In memory that grows with the distinct ids: lists may be larger than it."""
    whole, fresh, found = np.zeros(0, np.uint64), [], False
    for part in folder.batches(group):
        keep_Q = np.isin(part.query_ids, queries)
        found |= bool(keep_Q.any())
        for side in ("candidate", "positive"):
            starts = getattr(part, f"{side}_starts")
            ids = getattr(part, f"{side}_ids")
            fresh.append(np.unique(ids[np.repeat(keep_Q, np.diff(starts))]))
        # Seldom enough for all of this sorting to take little more than the last.
        if sum(map(len, fresh)) > len(whole):
            whole, fresh = np.unique(np.concatenate([whole, *fresh])), []
    return np.unique(np.concatenate([whole, *fresh])) if found else None


def _from_own_ids(
    writer: ListWriter, source: SourceConfig, folder: CandidateFolder, group: Group
) -> None:
    """Lists that name documents by the ids of a BEIR folder."""
    root = training_sets.beir_folder(source)
    # Once for the ids alone: as Python strings, those of all lists are ten times the files.
    numbers: dict[str, int] = {}
    queries: dict[str, str | None] = {}
    for part in folder.batches(group):
        for ids in (part.candidate_ids, part.positive_ids):
            numbers.update(dict.fromkeys(ids, _NOT_FOUND))
        queries.update(dict.fromkeys(part.query_ids))
    key, known = next(iter(source.parents), None), False
    bad = BadRecords(source)
    for where, name, text, record in training_sets.beir_records(source, root, "corpus", bad):
        parent = None
        if key is not None:
            known |= key in record
            try:
                (parent,) = _parents([record.get(key)], where)
            except DataError as problem:
                bad.bad(problem, counted=True)
                continue
        if name in numbers:
            # A document without text says nothing, as a positive or as a negative.
            numbers[name] = writer.document(text) if text else _NO_TEXT
            if text:
                writer.parent(numbers[name], parent)
    if key is not None and not known:
        raise DataError(
            f"source {source.name!r}: no document in {root} has the key {key!r} that parents names"
        )
    for name, text in training_sets.beir_texts(source, root, "queries", bad):
        if name in queries:
            queries[name] = text
    bad.end()
    writer.left_out = bad.left_out
    missing = [one for one, number in numbers.items() if number == _NOT_FOUND]
    missing += [one for one, text in queries.items() if text is None]
    if missing:
        raise DataError(
            f"source {source.name!r}: {folder.directory} names {len(missing)} texts that {root} "
            f"does not hold, such as {missing[0]!r}"
            + ("" if bad.left_out else "; it was mined from other data: mine again")
            + (f", or are among the {bad.left_out} records left out" if bad.left_out else "")
        )
    for part in folder.batches(group):
        candidates, positives = (
            np.fromiter(map(numbers.__getitem__, ids), np.int64, len(ids))
            for ids in (part.candidate_ids, part.positive_ids)
        )
        for query, name in enumerate(part.query_ids):
            before = writer.query_count
            if writer.query(queries[name] or "") == before:
                _write_list(writer, part, query, positives, candidates)


def _write_list(
    writer: ListWriter, part: Any, query: int, positives: np.ndarray, candidates: np.ndarray
) -> None:
    places = slice(part.candidate_starts[query], part.candidate_starts[query + 1])
    known = slice(part.positive_starts[query], part.positive_starts[query + 1])
    some, given = positives[known] >= 0, candidates[places] >= 0
    writer.lists(
        positives[known][some],
        part.positive_scores[known][some],
        candidates[places][given],
        part.candidate_scores[places][given],
    )
