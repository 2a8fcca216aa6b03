"""Pairs of texts from plain files and from datasets libraries: Parquet, JSONL, the hub, TFDS."""

from __future__ import annotations

import difflib
import gzip
import importlib
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qsl

import pyarrow as pa
from pyarrow import parquet

from arcticjax.config.mining import InputConfig
from arcticjax.config.schema import SourceConfig
from arcticjax.data.bad_records import BadRecords
from arcticjax.data.stored import text_problem
from arcticjax.errors import DataError

HUB = "hub:"
TFDS = "tfds:"
_ENDINGS = (".parquet", ".jsonl", ".jsonl.gz")
# No pair of texts is longer; a file without line ends would otherwise be read into memory whole.
_LONGEST_LINE = 1 << 26
_PARQUET_ROWS = 1024
_PARQUET_BUFFER = 1 << 20


def read_pairs(
    source: SourceConfig, records: BadRecords | None = None
) -> Iterator[tuple[str, str]]:
    """Streams (query, document) of a source in a fixed order, in bounded memory.

    path: a Parquet, JSONL or JSONL.gz file, a folder of one of these kinds (by name, subfolders
    too), `hub:NAME?config=..&split=..&revision=..` (the datasets library, split train) or
    `tfds:NAME?split=..&data_dir=..` (NAME may be a folder that TFDS wrote). Raises DataError naming
    source, file and record (a line or row, from 1) for anything that is not a pair of texts, which
    `records` may allow to be left out instead.
    """
    records = records or BadRecords(source)
    if source.path.startswith(HUB):
        readers = [_read_records(source, source.path, "record", _hub_records(source), records)]
    elif source.path.startswith(TFDS):
        readers = [_read_records(source, source.path, "record", _tfds_records(source), records)]
    else:
        readers = [
            (_read_parquet if _kind(file) == "parquet" else _read_jsonl)(source, file, records)
            for file in source_files(source)
        ]
    found = False
    for pair in itertools.chain.from_iterable(readers):
        found = True
        yield pair
    records.end()
    if not found:
        raise DataError(f"{_where(source, source.path)}: holds no records")


def read_records(
    source: SourceConfig, columns: Mapping[str, str], records: BadRecords | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Streams whole records of a source as (where it stands, columns to values), values of any
    kind.

    columns: each column that must be there, and the field of data.sources that names it. Raises
    DataError as `read_pairs`. Whoever looks at the values tells `records` of good ones and of the
    end.
    """
    bad = records or BadRecords(source)
    readers: list[tuple[object, str, Iterable[tuple[int, Mapping[str, Any]]]]]
    if source.path.startswith(HUB):
        readers = [(source.path, "record", _hub_records(source))]
    elif source.path.startswith(TFDS):
        readers = [(source.path, "record", _tfds_records(source))]
    else:
        readers = [
            (file, "row", _parquet_records(source, file, columns, bad))
            if _kind(file) == "parquet"
            else (file, "line", json_lines(source, file, bad))
            for file in source_files(source)
        ]
    found = False
    for place, unit, numbered in readers:
        for number, record in numbered:
            found = True
            where = f"{_where(source, place)}, {unit} {number}"
            missing = next((column for column in columns if column not in record), None)
            if missing is None:
                yield where, record
            else:
                bad.bad(DataError(_no_column(where, columns[missing], missing, list(record))))
    if not found:
        raise DataError(f"{_where(source, source.path)}: holds no records")


def corpus_of(source: SourceConfig | InputConfig) -> SourceConfig | None:
    """The corpus that a source or an input of mining names beside its pairs, as a source whose
    query and document are one column; None where it names none."""
    if source.corpus is None:
        return None
    column = source.corpus_column
    return SourceConfig(name=source.name, path=source.corpus, query=column, document=column)


def text_lines(
    source: SourceConfig, file: Path, records: BadRecords
) -> Iterator[tuple[str, list[str]]]:
    """(where it stands, fields) of each line of a tab-separated text file, plain or gzipped, that
    is not blank, and not one that `records` leaves out."""
    number = 0
    try:
        opener = gzip.open if file.name.lower().endswith(".gz") else open
        with cast(BinaryIO, opener(file, "rb")) as lines:
            for number, line in enumerate(lines, 1):
                if line.isspace():
                    continue
                where = f"{_where(source, file)}, line {number}"
                try:
                    text = line.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    records.bad(DataError(f"{where}: not valid UTF-8 ({error})"))
                    continue
                yield where, text.rstrip("\r\n").split("\t")
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"{_where(source, file)}: cannot be read after line {number} ({_one_line(error)})"
        ) from error


def identity(source: SourceConfig) -> dict[str, Any]:
    """What the pairs of a source depend on, as JSON: columns, and name, size and time of its files.

    A hub or TFDS name stands for itself: pin a revision in it where its content may change.
    """
    facts: dict[str, Any] = {
        "path": source.path,
        "query": source.query,
        "document": source.document,
    }
    if source.bad_records != "error":
        facts["bad_records"] = source.bad_records
    if not source.path.startswith((HUB, TFDS)):
        facts["path"] = str(Path(source.path).expanduser().resolve())
        facts["files"] = []
        for file in source_files(source):
            status = file.stat()
            name = str(file.resolve())
            facts["files"].append([name, status.st_size, status.st_mtime_ns])
    return facts


def source_files(source: SourceConfig) -> list[Path]:
    """The files of a plain source in reading order; DataError where there is none to read."""
    scheme, address, _ = source.path.partition("://")
    if address:
        raise DataError(
            f"{_where(source, source.path)}: {scheme}:// addresses are not supported in this "
            "version (s3:// is, in data.sources of training); copy the files to a disk and give "
            "their path"
        )
    path = Path(source.path).expanduser()
    where = _where(source, path)
    if not path.exists():
        raise DataError(f"{where}: no such file or folder{_nearest_path(path)}")
    files = [path]
    if path.is_dir():
        files = plain_files(path)
        if not files:
            raise DataError(f"{where}: the folder holds no {', '.join(_ENDINGS)} file")
        if len({_kind(file) for file in files}) > 1:
            raise DataError(
                f"{where}: the folder holds both Parquet and JSONL files, perhaps the same pairs "
                "twice; point data.sources at one of them"
            )
    elif not _is_plain(path):
        raise DataError(f"{where}: unknown kind of file; expected {', '.join(_ENDINGS)}")
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"{_where(source, file)}: the file is empty; was it downloaded whole?")
    return files


def plain_files(folder: Path) -> list[Path]:
    """Parquet and JSONL files of a folder and its subfolders by name, hidden ones left out."""
    return sorted(
        file
        for file in folder.rglob("*")
        if _is_plain(file)
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def _is_plain(file: Path) -> bool:
    return file.name.lower().endswith(_ENDINGS)


def _read_parquet(
    source: SourceConfig, file: Path, records: BadRecords
) -> Iterator[tuple[str, str]]:
    where = _where(source, file)
    row = 0
    try:
        with parquet.ParquetFile(file, buffer_size=_PARQUET_BUFFER, pre_buffer=False) as table:
            for field, column in (("query", source.query), ("document", source.document)):
                _check_column(table.schema_arrow, where, field, column)
            columns = list(dict.fromkeys((source.query, source.document)))
            batches = table.iter_batches(_PARQUET_ROWS, columns=columns, use_threads=False)
            for batch in batches:
                queries = _texts(batch.column(source.query), where, source.query, row)
                documents = _texts(batch.column(source.document), where, source.document, row)
                for pair in zip(queries, documents, strict=True):
                    row += 1
                    if _is_good(pair, source, f"{where}, row {row}", records):
                        yield pair
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{where}: cannot be read as Parquet after row {row} ({_one_line(error)}); "
            "the file is damaged or incomplete"
        ) from error


def _parquet_records(
    source: SourceConfig, file: Path, columns: Mapping[str, str], records: BadRecords
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    where, row = _where(source, file), 0
    try:
        with parquet.ParquetFile(file, buffer_size=_PARQUET_BUFFER, pre_buffer=False) as table:
            for column, field in columns.items():
                if column not in table.schema_arrow.names:
                    raise DataError(_no_column(where, field, column, table.schema_arrow.names))
            for batch in table.iter_batches(_PARQUET_ROWS, columns=list(columns)):
                for number in range(len(batch)):
                    row += 1
                    try:
                        (record,) = batch.slice(number, 1).to_pylist()
                    except UnicodeDecodeError as error:
                        records.bad(DataError(f"{where}, row {row}: not valid UTF-8 ({error})"))
                        continue
                    yield row, record
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{where}: cannot be read as Parquet after row {row} ({_one_line(error)}); "
            "the file is damaged or incomplete"
        ) from error


def _check_column(schema: pa.Schema, where: str, field: str, column: str) -> None:
    if column not in schema.names:
        raise DataError(_no_column(where, field, column, schema.names))
    if schema.names.count(column) > 1:
        raise DataError(f"{where}: has several columns named {column!r}")
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    # An all-null column has no type; its first row is reported as any null is.
    checks = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_null,
    )
    if not any(check(kind) for check in checks):
        raise DataError(
            f"{where}: column {column!r} holds {kind}, not text; name a text column as "
            f"data.sources {field}"
        )


def _texts(array: pa.Array, where: str, column: str, offset: int) -> list[Any]:
    """The values of a column; what is not UTF-8 is the error that says so."""
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        return [
            _text(value, f"{where}, row {row}: column {column!r}")
            for row, value in enumerate(array, offset + 1)
        ]


def _text(value: pa.Scalar, where: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return DataError(f"{where} is not valid UTF-8 ({error})")


def _read_jsonl(source: SourceConfig, file: Path, records: BadRecords) -> Iterator[tuple[str, str]]:
    return _read_records(source, file, "line", json_lines(source, file, records), records)


def json_lines(
    source: SourceConfig, file: Path, records: BadRecords | None = None
) -> Iterator[tuple[int, Any]]:
    """(line number, object) of each line that is not blank, and not one that `records` leaves
    out."""
    where = _where(source, file)
    number = 0
    try:
        opener = gzip.open if file.name.lower().endswith(".gz") else open
        with cast(BinaryIO, opener(file, "rb")) as lines:
            while line := lines.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE:
                    raise DataError(
                        f"{where}, line {number}: longer than {_LONGEST_LINE >> 20} MiB; is this "
                        "JSONL, one object a line?"
                    )
                if line.isspace():
                    continue
                try:
                    record = _json_object(line, f"{where}, line {number}")
                except DataError as problem:
                    if records is None:
                        raise
                    records.bad(problem)
                    continue
                yield number, record
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{where}: the gzip data break off or are damaged after line {number} "
            f"({_one_line(error)}); fetch the file again"
        ) from error
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror or error})") from error


def _json_object(line: bytes, where: str) -> Any:
    try:
        # Some editors begin a file with a byte order mark.
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not valid UTF-8 ({error}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({_one_line(error)})") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: holds {type(value).__name__}, expected an object {{...}}")
    return value


def _read_records(
    source: SourceConfig,
    place: object,
    unit: str,
    numbered: Iterable[tuple[int, Mapping[str, Any]]],
    records: BadRecords,
) -> Iterator[tuple[str, str]]:
    """Pairs from numbered mappings; a missing key is an error with the nearest key named."""
    where = _where(source, place)
    for number, record in numbered:
        try:
            pair = (record[source.query], record[source.document])
        except KeyError:
            field, column = "query", source.query
            if column in record:
                field, column = "document", source.document
            records.bad(
                DataError(_no_column(f"{where}, {unit} {number}", field, column, list(record)))
            )
            continue
        if _is_good(pair, source, f"{where}, {unit} {number}", records):
            yield pair


def _hub_records(source: SourceConfig) -> Iterator[tuple[int, Mapping[str, Any]]]:
    name, options = read_options(source, HUB, {"config", "split", "revision"})
    datasets = _library("datasets", source, "pip install datasets")
    try:
        dataset = datasets.load_dataset(
            name,
            options.get("config"),
            split=options.get("split", "train"),
            revision=options.get("revision"),
            streaming=True,
        )
        yield from enumerate(dataset, 1)
    except DataError:
        raise
    except Exception as error:
        raise _library_error(source, "the datasets library", error) from error


def _tfds_records(source: SourceConfig) -> Iterator[tuple[int, Mapping[str, Any]]]:
    name, options = read_options(source, TFDS, {"data_dir", "split"})
    tfds = _library("tensorflow_datasets", source, "pip install tensorflow-datasets")
    try:
        folder = os.path.expanduser(name)
        if os.path.isdir(folder):
            builder = tfds.builder_from_directory(folder)
        else:
            data_dir = options.get("data_dir")
            builder = tfds.builder(name, data_dir=data_dir and os.path.expanduser(data_dir))
        for number, record in enumerate(builder.as_data_source(options.get("split", "train")), 1):
            yield number, {key: _decoded(value) for key, value in record.items()}
    except UnicodeDecodeError as error:
        raise DataError(f"{_where(source, source.path)}: not valid UTF-8 ({error})") from error
    except Exception as error:
        raise _library_error(source, "TFDS", error) from error


def _decoded(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def read_options(source: SourceConfig, prefix: str, known: set[str]) -> tuple[str, dict[str, str]]:
    """Name and options of `prefix:NAME?key=value&..`."""
    name, _, query = source.path.removeprefix(prefix).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for option in options:
        if option not in known:
            raise DataError(
                f"{_where(source, source.path)}: unknown option {option!r}; known: "
                f"{', '.join(sorted(known))}"
            )
    if not name:
        raise DataError(f"{_where(source, source.path)}: no name after {prefix!r}")
    return name, options


def _library(module: str, source: SourceConfig, install: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{_where(source, source.path)}: needs the {module} library ({error}); {install}, or "
            "save the pairs as Parquet and give its path"
        ) from error


def _library_error(source: SourceConfig, library: str, error: Exception) -> DataError:
    return DataError(
        f"{_where(source, source.path)}: {library} could not read it ({_one_line(error)})"
    )


def _is_good(pair: tuple[Any, Any], source: SourceConfig, where: str, records: BadRecords) -> bool:
    """Whether both sides are usable text; what is not has been told to `records`."""
    for column, value in zip((source.query, source.document), pair, strict=True):
        problem = value if isinstance(value, DataError) else text_problem(value)
        if problem:
            if not isinstance(problem, DataError):
                problem = DataError(f"{where}: column {column!r} {problem}")
            records.bad(problem)
            return False
    records.good()
    return True


def _where(source: SourceConfig, place: object) -> str:
    return f"source {source.name!r}, {place}"


def _no_column(where: str, field: str, column: str, names: list[str]) -> str:
    shown = ", ".join(map(str, names[:20])) or "none"
    near = difflib.get_close_matches(column, list(map(str, names)), 1)
    advice = f"did you mean {near[0]!r}?" if near else f"set data.sources {field} to one of them"
    return f"{where}: no column {column!r} for the {field}; it has {shown}: {advice}"


def _nearest_path(path: Path) -> str:
    try:
        names = [other.name for other in path.parent.iterdir()]
    except OSError:
        return f" (nor its folder {path.parent})"
    near = difflib.get_close_matches(path.name, names, 1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _kind(file: Path) -> str:
    return "parquet" if file.suffix.lower() == ".parquet" else "jsonl"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
