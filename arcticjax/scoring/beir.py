"""Retrieval tasks in the BEIR folder layout (corpus.jsonl, queries.jsonl, qrels), read strictly."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from etils import epath

from arcticjax.errors import DataError

CORPUS_NAMES = ("corpus.jsonl", "corpus.jsonl.gz")
QUERIES_NAMES = ("queries.jsonl", "queries.jsonl.gz")
QRELS_NAMES = ("qrels.tsv", "qrels/test.tsv", "qrels.tsv.gz", "qrels/test.tsv.gz")
QRELS_HEADER = "query-id\tcorpus-id\tscore"


@dataclass(frozen=True)
class Task:
    """A retrieval task: documents, queries, and graded judgements between them.

    document_ids and documents run in parallel, as do query_ids and queries; ids are unique.
    documents: title and text joined by a space, stripped; may be empty, as in published sets.
    qrels: query id -> document id -> grade; 1 and above is relevant. Queries may lack judgements.
    """

    name: str
    document_ids: list[str]
    documents: list[str]
    query_ids: list[str]
    queries: list[str]
    qrels: dict[str, dict[str, int]]


def load_task(folder: str | os.PathLike[str], split: str | None = None) -> Task:
    """Reads a BEIR folder, plain or gzipped; qrels are `qrels.tsv` or `qrels/test.tsv`.

    folder: a local path or a bucket address; its last part names the task. split: take
    `qrels/SPLIT.tsv` instead.
    Raises DataError with file and line for whatever is missing, torn, malformed, duplicated with
    another meaning, or refers to an unknown id.
    """
    root = epath.Path(folder)
    if not root.is_dir():
        raise DataError(
            f"retrieval task {os.fspath(folder)!r} is not a folder; give one that holds "
            "corpus.jsonl, queries.jsonl and qrels.tsv (.gz is read too)"
        )
    qrels_names = QRELS_NAMES
    if split is not None:
        qrels_names = (f"qrels/{split}.tsv", f"qrels/{split}.tsv.gz")
    corpus, queries_file, qrels_file = (
        _only_file(root, names) for names in (CORPUS_NAMES, QUERIES_NAMES, qrels_names)
    )
    documents = _read_texts(corpus, titled=True)
    queries = _read_texts(queries_file, titled=False)
    qrels = _read_qrels(qrels_file, queries, documents)
    return Task(
        name=root.name or Path(os.path.abspath(os.fspath(folder))).name,
        document_ids=list(documents),
        documents=list(documents.values()),
        query_ids=list(queries),
        queries=list(queries.values()),
        qrels=qrels,
    )


def fingerprint(task: Task) -> str:
    """40 hexadecimal digits of a SHA-256 over all texts and judgements."""
    digest = hashlib.sha256()
    for part in (task.document_ids, task.documents, task.query_ids, task.queries, task.qrels):
        digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()[:40]


def write_task(folder: str | os.PathLike[str], task: Task) -> Path:
    """Writes a task as a plain BEIR folder that appears whole or not at all; returns the folder.

    Raises DataError if the folder exists with something in it, or the task could not be read back:
    ids are unique and hold no tab or line break, judgements refer to them, queries are not empty.
    """
    target = Path(folder)
    _check_writable(task)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"retrieval task folder {str(target)!r} exists already; remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        corpus = zip(task.document_ids, task.documents, strict=True)
        _write_lines(
            temporary / "corpus.jsonl",
            (_json({"_id": name, "title": "", "text": text}) for name, text in corpus),
        )
        queries = zip(task.query_ids, task.queries, strict=True)
        _write_lines(
            temporary / "queries.jsonl",
            (_json({"_id": name, "text": text}) for name, text in queries),
        )
        judgements = (
            f"{query}\t{document}\t{grade}"
            for query, grades in task.qrels.items()
            for document, grade in grades.items()
        )
        _write_lines(temporary / "qrels.tsv", iter((QRELS_HEADER, *judgements)))
        temporary.chmod(0o755)  # mkdtemp's folders are private
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _only_file(root: epath.Path, names: tuple[str, ...]) -> epath.Path:
    present = [name for name in names if (root / name).exists()]
    if not present:
        raise DataError(f"retrieval task {str(root)!r} has no file {' or '.join(names)}")
    if len(present) > 1:
        raise DataError(
            f"retrieval task {str(root)!r} has {' and '.join(present)}; "
            "keep one, they may not hold the same"
        )
    return root / present[0]


def _lines(path: epath.Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line without its break) of every line that is not blank."""
    number = 0
    try:
        with path.open("rb") as raw:
            plain = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
            with io.TextIOWrapper(cast(IO[bytes], plain), encoding="utf-8-sig") as text:
                # A file splits at \n, \r\n and \r only: JSON may hold U+2028 as it is.
                for line in text:
                    number += 1
                    if line.strip():
                        yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 after line {number}: {error}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: the gzip data breaks off after line {number} ({error}); fetch the file again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read after line {number}: {error}") from error


def _read_texts(path: epath.Path, *, titled: bool) -> dict[str, str]:
    """Reads id -> text in file order; with `titled`, 'title text' stripped, which may be empty."""
    texts: dict[str, str] = {}
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
        name = _identifier(record, where)
        if name in texts:
            raise DataError(f"{where}: the _id {name!r} was used before")
        text = _text(record, "text", where)
        if titled and record.get("title") is not None:
            text = f"{_text(record, 'title', where)} {text}"
        if titled:
            text = text.strip()
        elif not text.strip():
            raise DataError(f"{where}: the query {name!r} is empty")
        texts[name] = text
    if not texts:
        raise DataError(f"{path}: holds no records")
    return texts


def _identifier(record: dict[str, object], where: str) -> str:
    if "_id" not in record:
        raise DataError(f"{where}: no '_id' among the keys {sorted(record)}")
    name = record["_id"]
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{where}: '_id' must be a non-empty string, got {name!r}")
    return name


def _text(record: dict[str, object], key: str, where: str) -> str:
    text = record.get(key)
    if not isinstance(text, str):
        found = f"is {type(text).__name__}" if key in record else "is missing"
        raise DataError(f"{where}: {key!r} {found}, expected a string; keys: {sorted(record)}")
    if not _encodable(text):
        raise DataError(f"{where}: {key!r} holds half of a surrogate pair, which is not text")
    return text


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_qrels(
    path: epath.Path, queries: Mapping[str, str], documents: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    header_seen = False
    for number, line in _lines(path):
        where = f"{path}:{number}"
        fields = line.split("\t")
        if len(fields) != 3:
            raise DataError(
                f"{where}: expected 3 fields parted by tabs (query-id, corpus-id, score), "
                f"got {len(fields)}"
            )
        query, document, grade = fields
        if not header_seen:
            if _integer(grade) is not None:
                raise DataError(
                    f"{where}: the header is missing; put {QRELS_HEADER!r} before the judgements"
                )
            header_seen = True
            continue
        value = _integer(grade)
        if value is None:
            raise DataError(f"{where}: the score must be an integer, got {grade!r}")
        if query not in queries:
            raise DataError(f"{where}: query {query!r} is not among the queries")
        if document not in documents:
            raise DataError(f"{where}: document {document!r} is not in the corpus")
        if qrels.setdefault(query, {}).setdefault(document, value) != value:
            raise DataError(
                f"{where}: query {query!r} and document {document!r} were judged before, "
                f"as {qrels[query][document]}"
            )
    if not qrels:
        raise DataError(f"{path}: holds no judgements")
    if not any(grade > 0 for grades in qrels.values() for grade in grades.values()):
        raise DataError(f"{path}: no score is above 0, so no document answers any query")
    return qrels


def _integer(field: str) -> int | None:
    return int(field) if re.fullmatch(r"\s*[+-]?[0-9]+\s*", field) else None


def _check_writable(task: Task) -> None:
    for kind, names, texts in (
        ("document", task.document_ids, task.documents),
        ("query", task.query_ids, task.queries),
    ):
        if len(names) != len(texts):
            raise DataError(f"task {task.name!r}: {len(names)} {kind} ids, {len(texts)} texts")
        if len(set(names)) != len(names):
            raise DataError(f"task {task.name!r}: {kind} ids are not unique")
        for name in names:
            if not name.strip() or any(mark in name for mark in "\t\r\n"):
                raise DataError(f"task {task.name!r}: {kind} id {name!r} is blank or has a break")
        for name, text in zip(names, texts, strict=True):
            if not _encodable(name + text) or (kind == "query" and not text.strip()):
                raise DataError(f"task {task.name!r}: {kind} {name!r} is empty or not valid text")
    if not task.documents or not any(task.qrels.values()):
        raise DataError(f"task {task.name!r}: holds no documents or no judgements")
    queries, documents = set(task.query_ids), set(task.document_ids)
    for query, grades in task.qrels.items():
        unknown = ({query} - queries) | (grades.keys() - documents)
        if unknown:
            raise DataError(f"task {task.name!r}: judgements name unknown {sorted(unknown)[0]!r}")


def _json(record: dict[str, str]) -> str:
    return json.dumps(record, ensure_ascii=False)


def _write_lines(path: Path, lines: Iterator[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
