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

Each text and each relation between texts is a record that may be bad by itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from arcticjax.config.schema import SourceConfig
from arcticjax.data import adapters
from arcticjax.data.bad_records import BadRecords
from arcticjax.data.lists import ListWriter
from arcticjax.data.stored import text_problem
from arcticjax.errors import DataError
from arcticjax.models.tokenizer import TextTokenizer

BEIR = "beir:"
MSMARCO = "msmarco:"
ARCTIC = "arctictraining:"
_OPTIONS = {BEIR: {"split"}, MSMARCO: {"split", "negatives"}, ARCTIC: set[str]()}

_Line = TypeVar("_Line")
_Found = TypeVar("_Found")


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
    facts = [source.path, *([name, one.st_size, one.st_mtime_ns] for name, one in stats)]
    return facts if source.bad_records == "error" else [source.bad_records, *facts]


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
    bad = BadRecords(source)
    if source.path.startswith(BEIR):
        yield from _beir(source, writer, bad)
    elif source.path.startswith(MSMARCO):
        yield from _msmarco(source, writer, bad)
    else:
        yield from _arctic(source, tokenizer, writer, bad)
    bad.end()
    writer.left_out = bad.left_out


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


def beir_texts(
    source: SourceConfig, folder: Path, what: str, bad: BadRecords | None = None
) -> Iterator[tuple[str, str]]:
    """(id, text) of each line of `what`.jsonl[.gz]; a text may be empty."""
    for _, name, text, _ in beir_records(source, folder, what, bad):
        yield name, text


def beir_records(
    source: SourceConfig, folder: Path, what: str, bad: BadRecords | None = None
) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(where it stands, id, text, all fields) of each line of `what`.jsonl[.gz] that `bad` does not
    leave out."""
    bad = bad or BadRecords(source)
    file = _one_of(source, folder, f"{what}.jsonl", f"{what}.jsonl.gz")
    return _parsed(_json_lines(source, file, bad), _beir_text, bad)


def _parsed(
    lines: Iterable[tuple[str, _Line]], parse: Callable[[_Line, str], _Found], bad: BadRecords
) -> Iterator[_Found]:
    """What `parse` makes of each line and of where it stands; `bad` is told of both kinds."""
    for where, line in lines:
        try:
            found = parse(line, where)
        except DataError as problem:
            bad.bad(problem)
            continue
        bad.good()
        yield found


def _json_lines(
    source: SourceConfig, file: Path, bad: BadRecords
) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, record in adapters.json_lines(source, file, bad):
        yield f"source {source.name!r}, {file}, line {number}", dict(record)


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


def _beir(source: SourceConfig, writer: ListWriter, bad: BadRecords) -> Iterator[Record]:
    folder, options = _place(source)
    split = options.get("split", "train")
    file = _one_of(
        source, folder, *(f"{name}{end}" for name in (f"qrels/{split}.tsv", "qrels.tsv")
                          for end in ("", ".gz"))
    )  # fmt: skip
    lines = adapters.text_lines(source, file, bad)
    judged = (line for line in lines if line[1][0] != "query-id")  # the header
    positives = _positives(_parsed(judged, partial(_judgement, (0, 1, 2)), bad))
    queries, corpus = (beir_texts(source, folder, what, bad) for what in ("queries", "corpus"))
    yield from _joined(source, writer, bad, positives, {}, queries, corpus)


def _beir_text(record: dict[str, Any], where: str) -> tuple[str, str, str, dict[str, Any]]:
    name, text = record.get("_id"), titled(record)
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not isinstance(text, str):
        raise DataError(f"{where}: needs _id and text")
    if text and (problem := text_problem(text)):
        raise DataError(f"{where}: a text {problem}")
    return where, name, text, record


def _msmarco(source: SourceConfig, writer: ListWriter, bad: BadRecords) -> Iterator[Record]:
    folder, options = _place(source)
    split = options.get("split", "train")

    def lines(name: str) -> Iterator[tuple[str, list[str]]]:
        file = _one_of(source, folder, f"{name}.tsv", f"{name}.tsv.gz")
        return adapters.text_lines(source, file, bad)

    judgement = partial(_judgement, (0, 2, 3))
    positives = _positives(_parsed(lines(f"qrels.{split}"), judgement, bad))
    negatives: dict[str, list[str]] = {}
    if "negatives" in options:
        file = _one_of(source, folder, options["negatives"])
        if ".jsonl" in file.name:
            found = _parsed(_json_lines(source, file, bad), _msmarco_negatives, bad)
        else:
            found = _parsed(adapters.text_lines(source, file, bad), _msmarco_triple, bad)
        for query, ids in found:
            negatives.setdefault(query, []).extend(ids)
            for _ in ids[1:]:  # of a line that holds several relations
                bad.good()
        positives = {query: ids for query, ids in positives.items() if query in negatives}
    queries, corpus = (
        _parsed(lines(name), _msmarco_text, bad) for name in (f"queries.{split}", "collection")
    )
    yield from _joined(source, writer, bad, positives, negatives, queries, corpus)


def _msmarco_text(fields: list[str], where: str) -> tuple[str, str]:
    if len(fields) != 2:
        raise DataError(f"{where}: {len(fields)} fields, expected an id and a text")
    return fields[0], fields[1]


def _msmarco_triple(fields: list[str], where: str) -> tuple[str, list[str]]:
    if len(fields) != 3:
        raise DataError(f"{where}: {len(fields)} fields, expected ids of query, positive and "
                        "negative")  # fmt: skip
    return fields[0], [fields[2]]


def _msmarco_negatives(record: dict[str, Any], where: str) -> tuple[str, list[str]]:
    try:
        found = record["neg"]
        systems = list(found.values()) if isinstance(found, dict) else [found]
        if not all(isinstance(system, list) for system in systems):
            raise TypeError
        ids = [str(one) for system in systems for one in system]
        return str(record["qid"]), list(dict.fromkeys(ids))
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: needs qid and neg, lists of ids") from error


def _judgement(
    columns: tuple[int, int, int], fields: list[str], where: str
) -> tuple[str, str, bool]:
    """Ids of a query and of a document, and whether this answers that."""
    query, document, grade = columns
    try:
        return fields[query], fields[document], float(fields[grade]) >= 1
    except (IndexError, ValueError) as error:
        raise DataError(f"{where}: no grade in column {grade + 1}") from error


def _positives(judgements: Iterable[tuple[str, str, bool]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for query, document, relevant in judgements:
        if relevant:
            found.setdefault(query, []).append(document)
    return found


def _joined(
    source: SourceConfig,
    writer: ListWriter,
    bad: BadRecords,
    positives: dict[str, list[str]],
    negatives: dict[str, list[str]],
    queries: Iterable[tuple[str, str]],
    corpus: Iterable[tuple[str, str]],
) -> Iterator[Record]:
    """Ids replaced by texts; queries with a positive only. Documents without text are left out."""
    if not positives:
        raise DataError(f"source {source.name!r}, {source.path}: no query has a positive")
    texts = {name: text for name, text in queries if name in positives}
    for query in positives:
        problem = text_problem(texts[query]) if query in texts else "is not among the queries"
        if problem:
            where = f"source {source.name!r}, {source.path}: query {query!r}"
            bad.bad(DataError(f"{where}, which has a positive, {problem}"), counted=True)
            texts.pop(query, None)
    if not texts:
        raise DataError(f"source {source.name!r}, {source.path}: no query with a positive has text")
    needed = {
        one for query in texts for ids in (positives, negatives) for one in ids.get(query, ())
    }
    numbers = {
        name: writer.document(text) if text and not text.isspace() else None
        for name, text in corpus
        if name in needed
    }

    def numbered(ids: list[str], query: str) -> list[tuple[int, float]]:
        found = []
        for name in ids:
            if name not in numbers:
                problem = (
                    f"query {query!r} names document {name!r}, which is not in the corpus or was "
                    "left out of it"
                )
                bad.bad(
                    DataError(f"source {source.name!r}, {source.path}: {problem}"), counted=True
                )
            elif (number := numbers[name]) is not None:
                found.append((number, math.nan))
        return found

    for query, ids in positives.items():
        if query in texts:
            found, others = numbered(ids, query), numbered(negatives.get(query, []), query)
            yield Record(writer.query(texts[query]), found, others)


def _arctic(
    source: SourceConfig, tokenizer: TextTokenizer, writer: ListWriter, bad: BadRecords
) -> Iterator[Record]:
    folder, _ = _place(source)
    for batch in _batches(source, folder):
        where = f"source {source.name!r}, {batch}"
        prompts = _arctic_prompts(source, _metadata(source, batch), tokenizer)
        try:
            queries = _columns(batch / "queries.parquet", "BATCH_QUERY_ID", "QUERY_TOKEN_ID_LIST")
            documents = _columns(
                batch / "documents.parquet", "BATCH_DOCUMENT_ID", "DOCUMENT_TOKEN_ID_LIST"
            )
            related = _columns(
                batch / "relations.parquet", "BATCH_QUERY_ID", "BATCH_DOCUMENT_ID", "RELEVANCE"
            )
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise DataError(
                f"{where}: no whole batch of queries, documents and relations ({error})"
            ) from error
        numbers: dict[str, dict[Any, int]] = {}
        for side, columns in (("query", queries), ("document", documents)):
            rows = zip(*columns, strict=True)
            named = ((f"{where}, {side} {row[0]}", row) for row in rows)
            parse = partial(_arctic_text, tokenizer, prompts[side])
            texts = _parsed(named, parse, bad)
            numbers[side] = {name: writer.tokens(side, *text) for name, text in texts}
        rows = enumerate(zip(*related, strict=True), 1)
        named = ((f"{where}, relations.parquet, row {row}", values) for row, values in rows)
        found = {query: Record(number, [], []) for query, number in numbers["query"].items()}
        for query, document, relevance in _parsed(named, partial(_arctic_relation, numbers), bad):
            if relevance:
                kind = found[query].positives if relevance > 0 else found[query].candidates
                kind.append((numbers["document"][document], math.nan))
        yield from found.values()


def _arctic_text(
    tokenizer: TextTokenizer, prompt: list[int], row: tuple[Any, ...], where: str
) -> tuple[Any, tuple[int, np.ndarray]]:
    """The id of a text within its batch; id and tokens by which it is kept, without the special
    tokens and the prompt, which the run adds itself."""
    name, listed = row
    try:
        own = np.asarray(listed or [], np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where} holds no list of token ids") from error
    if own[:1].tolist() == [tokenizer.start_id]:
        own = own[1:]
    if own[-1:].tolist() == [tokenizer.end_id]:
        own = own[:-1]
    if len(own) and own[: len(prompt)].tolist() != prompt:
        raise DataError(f"{where} does not begin with the prompt in metadata.json")
    own = own[len(prompt) :]
    if not len(own) or own.min() < 0 or own.max() >= tokenizer.vocab_size:
        raise DataError(f"{where} is empty or not of this tokenizer")
    digest = hashlib.blake2b(own.astype("<i8").tobytes(), digest_size=8).digest()
    return name, (int.from_bytes(digest, "little"), own)


def _arctic_relation(
    numbers: dict[str, dict[Any, int]], row: tuple[Any, ...], where: str
) -> tuple[Any, Any, float]:
    query, document, relevance = row
    if not isinstance(relevance, int | float) or math.isnan(relevance):
        raise DataError(f"{where}: the relevance {relevance!r} is not a number")
    for side, name in (("query", query), ("document", document)):
        # A relevance of 0 says nothing of its document.
        if name not in numbers[side] and (relevance or side == "query"):
            raise DataError(
                f"{where}: names {side} {name}, which the batch does not hold or which was left out"
            )
    return query, document, relevance


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
