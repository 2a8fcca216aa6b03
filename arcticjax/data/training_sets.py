"""Public training sets in the layouts they are published in, read as lists.

beir:FOLDER?split=train
    queries.jsonl, corpus.jsonl and qrels/SPLIT.tsv (or qrels.tsv), plain or gzipped
msmarco:FOLDER?split=train&negatives=FILE
    collection.tsv, queries.SPLIT.tsv, qrels.SPLIT.tsv; negatives: query, positive and negative
    id in a line, as in qidpidtriples.*.tsv, or JSONL with qid, pos and neg (lists of ids, or of
    such lists by system) as in msmarco-hard-negatives.jsonl.gz
arctictraining:FOLDER
    batch folders of queries, documents and relations in Parquet, each with a metadata.json in it
    or up to two folders above it; texts are token ids, the prompts that it names included
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from arcticjax.config.schema import SourceConfig
from arcticjax.data import adapters
from arcticjax.data.lists import ListWriter, checked_texts
from arcticjax.errors import DataError
from arcticjax.models.tokenizer import TextTokenizer

BEIR = "beir:"
MSMARCO = "msmarco:"
ARCTIC = "arctictraining:"
_OPTIONS = {BEIR: {"split"}, MSMARCO: {"split", "negatives"}, ARCTIC: set[str]()}


@dataclass(frozen=True)
class Record:
    """A query with its own positives and candidates: numbers of documents, scores (NaN =
    unknown)."""

    query: int
    positives: list[tuple[int, float]]
    candidates: list[tuple[int, float]]


def knows(path: str) -> bool:
    """Whether a path is in one of the layouts of this module."""
    return path.startswith((BEIR, MSMARCO, ARCTIC))


def identity(source: SourceConfig) -> list[Any]:
    """What a source of this module depends on, as JSON: its path, and its files' name, size and
    time."""
    stats = [(str(path), path.stat()) for path in files(source)]
    return [source.path, *([name, one.st_size, one.st_mtime_ns] for name, one in stats)]


def files(source: SourceConfig) -> list[Path]:
    """All files of a source of this module; DataError where its folder is not there."""
    folder, _ = _place(source)
    found = {path for path in folder.rglob("*") if path.is_file()}
    if source.path.startswith(ARCTIC):
        # The path may be of the folder below the one that says which prompts there are.
        found |= {_metadata(source, batch) for batch in _batches(source, folder)}
    return sorted(found)


def read(source: SourceConfig, tokenizer: TextTokenizer, writer: ListWriter) -> Iterator[Record]:
    """The records of a source of this module; their texts go into `writer`."""
    if source.path.startswith(BEIR):
        return _beir(source, writer)
    if source.path.startswith(MSMARCO):
        return _msmarco(source, writer)
    return _arctic(source, tokenizer, writer)


def titled(document: dict[str, Any]) -> Any:
    """Title and text of a document joined by a space, as BEIR's own models read it."""
    title, text = document.get("title") or "", document.get("text")
    if not isinstance(text, str) or not isinstance(title, str):
        return text
    return f"{title} {text}".strip()


def beir_folder(source: SourceConfig) -> Path:
    """The folder of a `beir:` source; DataError for another path."""
    if not source.path.startswith(BEIR):
        raise DataError(
            f"source {source.name!r}: its candidates were mined from a BEIR folder; give that as "
            f"path: {BEIR}FOLDER?split=train"
        )
    return _place(source)[0]


def beir_texts(source: SourceConfig, folder: Path, what: str) -> Iterator[tuple[str, str]]:
    """(id, text) of each line of `what`.jsonl[.gz]; a document may be empty."""
    for _, name, text, _ in beir_records(source, folder, what):
        yield name, text


def beir_records(
    source: SourceConfig, folder: Path, what: str
) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(where it stands, id, text, all fields) of each line of `what`.jsonl[.gz]."""
    file = _one_of(source, folder, f"{what}.jsonl", f"{what}.jsonl.gz")
    for number, record in adapters.json_lines(source, file):
        where = f"source {source.name!r}, {file}, line {number}"
        name, text = record.get("_id"), titled(dict(record))
        if not isinstance(name, str) or not isinstance(text, str):
            raise DataError(f"{where}: needs _id and text")
        yield where, name, text, dict(record)


def _place(source: SourceConfig) -> tuple[Path, dict[str, str]]:
    prefix = next(one for one in _OPTIONS if source.path.startswith(one))
    name, options = adapters.read_options(source, prefix, _OPTIONS[prefix])
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise DataError(f"source {source.name!r}, {folder}: no such folder")
    return folder, options


def _one_of(source: SourceConfig, folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"source {source.name!r}, {folder}: has no file {' or '.join(names)}")


def _beir(source: SourceConfig, writer: ListWriter) -> Iterator[Record]:
    folder, options = _place(source)
    split = options.get("split", "train")
    file = _one_of(
        source, folder, *(f"{name}{end}" for name in (f"qrels/{split}.tsv", "qrels.tsv")
                          for end in ("", ".gz"))
    )  # fmt: skip
    wanted: dict[str, list[str]] = {}
    for place, (where, fields) in enumerate(adapters.text_lines(source, file)):
        if place == 0 and fields[:1] == ["query-id"]:
            continue
        if _relevant(fields, 2, where):
            wanted.setdefault(fields[0], []).append(fields[1])
    queries = dict(beir_texts(source, folder, "queries"))
    yield from _joined(source, writer, wanted, {}, queries, beir_texts(source, folder, "corpus"))


def _msmarco(source: SourceConfig, writer: ListWriter) -> Iterator[Record]:
    folder, options = _place(source)
    split = options.get("split", "train")

    def table(name: str) -> Iterator[tuple[str, str]]:
        file = _one_of(source, folder, f"{name}.tsv", f"{name}.tsv.gz")
        for where, fields in adapters.text_lines(source, file):
            if len(fields) != 2:
                raise DataError(f"{where}: {len(fields)} fields, expected an id and a text")
            yield fields[0], fields[1]

    wanted: dict[str, list[str]] = {}
    judged = _one_of(source, folder, f"qrels.{split}.tsv", f"qrels.{split}.tsv.gz")
    for where, fields in adapters.text_lines(source, judged):
        if _relevant(fields, 3, where):
            wanted.setdefault(fields[0], []).append(fields[2])
    negatives: dict[str, list[str]] = {}
    if "negatives" in options:
        file = _one_of(source, folder, options["negatives"])
        for query, ids in _msmarco_negatives(source, file):
            negatives.setdefault(query, []).extend(ids)
        wanted = {query: ids for query, ids in wanted.items() if query in negatives}
    queries = dict(table(f"queries.{split}"))
    yield from _joined(source, writer, wanted, negatives, queries, table("collection"))


def _msmarco_negatives(source: SourceConfig, file: Path) -> Iterator[tuple[str, list[str]]]:
    if ".jsonl" in file.name:
        for number, record in adapters.json_lines(source, file):
            try:
                found = record["neg"]
                systems = found.values() if isinstance(found, dict) else [found]
                ids = [str(one) for system in systems for one in system]
                yield str(record["qid"]), list(dict.fromkeys(ids))
            except (KeyError, TypeError) as error:
                raise DataError(
                    f"source {source.name!r}, {file}, line {number}: needs qid and neg, lists of "
                    "ids"
                ) from error
        return
    for where, fields in adapters.text_lines(source, file):
        if len(fields) != 3:
            raise DataError(f"{where}: {len(fields)} fields, expected ids of query, positive and "
                            "negative")  # fmt: skip
        yield fields[0], [fields[2]]


def _relevant(fields: list[str], place: int, where: str) -> bool:
    try:
        return float(fields[place]) >= 1
    except (IndexError, ValueError) as error:
        raise DataError(f"{where}: no grade in column {place + 1}") from error


def _joined(
    source: SourceConfig,
    writer: ListWriter,
    positives: dict[str, list[str]],
    negatives: dict[str, list[str]],
    queries: dict[str, str],
    corpus: Iterator[tuple[str, str]],
) -> Iterator[Record]:
    """Ids replaced by texts; queries with a positive only. Documents without text are left out."""
    needed = {one for ids in (*positives.values(), *negatives.values()) for one in ids}
    numbers = {name: writer.document(text) for name, text in corpus if name in needed and text}
    known = [query for query in positives if query in queries]
    if not known:
        raise DataError(f"source {source.name!r}, {source.path}: no query has a positive")
    for query in known:
        (text,) = checked_texts([queries[query]], f"source {source.name!r}, query {query!r}")
        found = [numbers[one] for one in positives[query] if one in numbers]
        yield Record(
            writer.query(text),
            [(one, math.nan) for one in found],
            [(numbers[one], math.nan) for one in negatives.get(query, []) if one in numbers],
        )


def _arctic(source: SourceConfig, tokenizer: TextTokenizer, writer: ListWriter) -> Iterator[Record]:
    folder, _ = _place(source)
    for batch in _batches(source, folder):
        prompts = _arctic_prompts(source, _metadata(source, batch), tokenizer)
        try:
            sides = {
                side: _arctic_side(batch, side, tokenizer, prompts[side], writer)
                for side in ("query", "document")
            }
            related = _columns(
                batch / "relations.parquet", "BATCH_QUERY_ID", "BATCH_DOCUMENT_ID", "RELEVANCE"
            )
            found: dict[int, Record] = {}
            for query, document, relevance in zip(*related, strict=True):
                number = sides["query"][query]
                record = found.setdefault(query, Record(number, [], []))
                if relevance:
                    kind = record.positives if relevance > 0 else record.candidates
                    kind.append((sides["document"][document], math.nan))
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise DataError(
                f"source {source.name!r}, {batch}: no whole batch of queries, documents and "
                f"relations ({error})"
            ) from error
        yield from found.values()


def _arctic_side(
    batch: Path, side: str, tokenizer: TextTokenizer, prompt: list[int], writer: ListWriter
) -> dict[int, int]:
    """Numbers of one side's texts by their id within the batch; special tokens and prompt, which
    the run adds itself, are taken off."""
    name, upper = ("queries", "QUERY") if side == "query" else ("documents", "DOCUMENT")
    ids, texts = _columns(batch / f"{name}.parquet", f"BATCH_{upper}_ID", f"{upper}_TOKEN_ID_LIST")
    numbers = {}
    for identity, tokens in zip(ids, texts, strict=True):
        if tokens[:1] == [tokenizer.start_id]:
            tokens = tokens[1:]
        if tokens[-1:] == [tokenizer.end_id]:
            tokens = tokens[:-1]
        if tokens[: len(prompt)] != prompt:
            raise ValueError(f"{side} {identity} does not begin with the prompt in metadata.json")
        own = np.asarray(tokens[len(prompt) :], np.int64)
        if not len(own) or own.min() < 0 or own.max() >= tokenizer.vocab_size:
            raise ValueError(f"{side} {identity} is empty or not of this tokenizer")
        digest = hashlib.blake2b(own.astype("<i8").tobytes(), digest_size=8).digest()
        numbers[identity] = writer.tokens(side, int.from_bytes(digest, "little"), own)
    return numbers


def _batches(source: SourceConfig, folder: Path) -> list[Path]:
    found = sorted({file.parent for file in folder.rglob("relations.parquet")})
    if not found:
        raise DataError(f"source {source.name!r}, {folder}: holds no batch (relations.parquet)")
    return found


def _metadata(source: SourceConfig, batch: Path) -> Path:
    """The nearest metadata.json of a batch: in its folder, or up to two above, for the batches are
    written into a folder `data` beside it."""
    for place in (batch, *batch.absolute().parents[:2]):
        if (place / "metadata.json").is_file():
            return (place / "metadata.json").absolute()
    raise DataError(
        f"source {source.name!r}, {batch}: no metadata.json here or up to two folders above, which "
        "says with what prompts the texts begin; copy the one that was written with the batches "
        'there, or write {"query_prefix": "", "document_prefix": ""} where they have none'
    )


def _arctic_prompts(
    source: SourceConfig, file: Path, tokenizer: TextTokenizer
) -> dict[str, list[int]]:
    """Tokens of the prompts that a metadata.json names, by side; none where it names none."""
    prompts: dict[str, list[int]] = {"query": [], "document": []}
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        stated = [(str(key).lower(), value) for key, value in facts.items()]
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"source {source.name!r}, {file}: cannot be read ({error})") from error
    for key, value in stated:
        side = "query" if "query" in key else "document" if "doc" in key else None
        if side is not None and "prefix" in key and isinstance(value, str):
            prompts[side] = tokenizer.encode([value])[0].tolist()
    return prompts


def _columns(file: Path, *names: str) -> tuple[list[Any], ...]:
    table = parquet.read_table(file, columns=list(names))
    return tuple(table.column(name).to_pylist() for name in names)
