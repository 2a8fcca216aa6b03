"""Stored sources: tokenised pairs on disk, read at random.

A stored source is a folder: ArrayRecord shards with TFDS metadata (`tfds.builder_from_directory`
opens it), four `.npy` sidecars that are memory-mapped (lengths and ids of the texts), and
`manifest.json`. It appears complete or not at all, and never changes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from arcticjax.data import record_files, record_format
from arcticjax.errors import DataError, ResourceError
from arcticjax.models.tokenizer import TextTokenizer

FORMAT = "arcticjax-source"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
# Where prompts and special tokens come in: nothing stored holds them.
PROMPTS = "added to batches"
SIDECARS = {
    "query_lengths": np.dtype("<u4"),
    "document_lengths": np.dtype("<u4"),
    "query_ids": np.dtype("<u8"),
    "document_ids": np.dtype("<u8"),
}

# A small buffer: a record has some hundred bytes, and fetching 1 MiB around each takes five times
# as long.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER = 4096
# Large: a read has a fixed cost of about 0.7 ms per shard it touches (200 records' worth).
_SHARD_BYTES = 8 << 30
_BATCH_PAIRS = 1024
_BATCH_CHARACTERS = 1 << 21
_PROGRESS_SECONDS = 15.0

_log = logging.getLogger(__name__)


class StoredSource:
    """A tokenised source on disk; safe to share between threads and to pickle (by its folder).

    query_lengths, document_lengths: uint32 [pairs], a text's own tokens: no special tokens, no
    prompt, uncut. query_ids, document_ids: uint64 [pairs], `text_id` of the text. All four are
    memory-mapped.
    fingerprint: hex digest of the content; independent of the folder, the name and the origin.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.name: str = manifest["name"]
        self.query_lengths = self._sidecar("query_lengths")
        self.document_lengths = self._sidecar("document_lengths")
        self.query_ids = self._sidecar("query_ids")
        self.document_ids = self._sidecar("document_ids")
        self.fingerprint = _fingerprint(manifest)
        self._token_dtype = np.dtype(f"<u{manifest['token_bytes']}")
        self._shards: list[str] = [shard["file"] for shard in manifest["shards"]]
        self._starts = np.cumsum([0] + [shard["records"] for shard in manifest["shards"]])
        self._readers: list[Any] = [None] * len(self._shards)
        self._lock = threading.Lock()
        if self._starts[-1] != len(self):
            raise DataError(f"{directory / MANIFEST}: shards do not add up to {len(self)} pairs")

    def __len__(self) -> int:
        return self.manifest["pairs"]

    def __reduce__(self) -> tuple[Any, ...]:
        return open_source, (self.directory,)

    def read(self, records: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Token ids of the queries and of the documents of `records`, in the order given.

        records: integers in [0, len), repeats allowed. Each text is an unsigned 16- or 32-bit view
        into a buffer of the call, without special tokens or prompt, uncut. Raises DataError where
        the files do not hold what the manifest says.
        """
        records = np.asarray(records, np.int64)
        if not records.size:
            return [], []
        if records.min() < 0 or records.max() >= len(self):
            raise IndexError(f"source {self.name!r} has records 0..{len(self) - 1}")
        width = self._token_dtype.itemsize
        query_sizes = self.query_lengths[records].astype(np.int64) * width
        document_sizes = self.document_lengths[records].astype(np.int64) * width
        query_starts, document_starts, sizes = record_format.places(query_sizes, document_sizes)
        raw = self._raw(records)
        found = np.fromiter(map(len, raw), np.int64, len(raw))
        if not np.array_equal(found, sizes):
            record = int(records[np.argmax(found != sizes)])
            raise DataError(
                f"{self._shard_path(record)}: record {record} of source {self.name!r} has not the "
                "size that its length sidecars say; the folder was altered: write the source again"
            )
        return (
            self._cut(raw, query_starts, query_sizes),
            self._cut(raw, document_starts, document_sizes),
        )

    def _cut(self, raw: list[bytes], starts: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
        ends = (starts + sizes).tolist()
        pieces = zip(raw, starts.tolist(), ends, strict=True)
        joined = b"".join([record[start:end] for record, start, end in pieces])
        flat = np.frombuffer(joined, self._token_dtype)
        edges = [0, *np.cumsum(sizes // self._token_dtype.itemsize).tolist()]
        return [flat[start:end] for start, end in itertools.pairwise(edges)]

    def _raw(self, records: np.ndarray) -> list[bytes]:
        order = np.argsort(records, kind="stable")
        in_order = records[order]
        edges = np.searchsorted(in_order, self._starts)
        found: list[bytes] = []
        for shard in np.flatnonzero(np.diff(edges)).tolist():
            places = in_order[edges[shard] : edges[shard + 1]] - self._starts[shard]
            path = self.directory / self._shards[shard]
            try:
                found += self._reader(shard).read(places.tolist())
            except (RuntimeError, ValueError, IndexError, OSError) as error:
                raise DataError(
                    f"{path}: cannot be read ({error}); the file is damaged: write the source again"
                ) from error
        result: list[bytes] = [b""] * len(found)
        for place, record in zip(order.tolist(), found, strict=True):
            result[place] = record
        return result

    def _reader(self, shard: int) -> Any:
        if self._readers[shard] is None:
            with self._lock:
                if self._readers[shard] is None:
                    self._readers[shard] = array_record_module.ArrayRecordReader(
                        str(self.directory / self._shards[shard]),
                        _READER_OPTIONS,
                        file_reader_buffer_size=_READER_BUFFER,
                    )
        return self._readers[shard]

    def _shard_path(self, record: int) -> Path:
        shard = int(np.searchsorted(self._starts, record, side="right")) - 1
        return self.directory / self._shards[shard]

    def _sidecar(self, name: str) -> np.ndarray:
        path = self.directory / f"{name}.npy"
        try:
            array = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except (ValueError, OSError, EOFError) as error:
            raise DataError(
                f"{path}: not a NumPy array ({error}); write the source again"
            ) from error
        if array.shape != (len(self),) or array.dtype != SIDECARS[name]:
            raise DataError(
                f"{path}: holds {array.dtype}{list(array.shape)}, expected "
                f"{SIDECARS[name]}[{len(self)}]; write the source again"
            )
        return array


def text_id(text: str) -> int:
    """Stable 64-bit id of a text, the same on every machine (BLAKE2b, 8 bytes, little-endian)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def text_problem(value: object) -> str | None:
    """What is wrong with a side of a pair, in words that follow its name; None for usable text."""
    if not isinstance(value, str):
        if value is None:
            return "is missing (null); a pair needs text on both sides: remove the record"
        return f"is not text but {type(value).__name__} ({str(value)[:40]!r})"
    if not value or value.isspace():
        return "is empty; a pair needs text on both sides: remove the record"
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"is not valid Unicode (a lone surrogate in {value[:40]!r})"
    return None


def has_own_manifest(directory: Path) -> bool:
    """Whether a folder's manifest says that it is a stored source; other programs write files of
    that name too."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def open_source(directory: Path | str, *, verify: bool = False) -> StoredSource:
    """Opens a stored source; sizes of all files are checked, and with `verify` their SHA-256 too.

    Raises DataError naming the file that is missing, torn or of an unknown format version.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{directory}: not a stored source: {MANIFEST} is missing") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); write the source again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: is not the manifest of a stored source (format {FORMAT!r})")
    if manifest.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {manifest.get('version')!r} is unknown, this program reads "
            f"{FORMAT_VERSION}; update arcticjax or write the source again"
        )
    if manifest.get("prompts", PROMPTS) != PROMPTS:
        raise DataError(
            f"{path}: its prompts are {manifest['prompts']!r}, but batches would add them again; "
            "update arcticjax or write the source again"
        )
    try:
        for name, facts in manifest["files"].items():
            _check_file(directory, name, facts, verify)
        # What is read is a file that was checked, and so one of this folder.
        for name in [f"{name}.npy" for name in SIDECARS] + [
            shard["file"] for shard in manifest["shards"]
        ]:
            manifest["files"][name]
        return StoredSource(directory, manifest)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: lacks or distorts {error}; write the source again") from error


def write_source(
    directory: Path | str,
    name: str,
    pairs: Iterable[tuple[str, str]],
    tokenizer: TextTokenizer,
    *,
    origin: dict[str, Any],
    licence: str | None = None,
    language: Sequence[str] = (),
    left_out: Callable[[], int] = lambda: 0,
    shard_bytes: int = _SHARD_BYTES,
) -> StoredSource:
    """Tokenises `pairs` into a stored source, in bounded memory; equal input gives equal bytes.

    The folder is built beside its place and renamed into it. Where another process was faster, its
    folder is used and must hold the same content. origin: JSON, what the pairs are (path,
    columns). licence, language: of the texts, for the manifest, where known. left_out: how many
    records were, asked for at the end. shard_bytes: size of a shard, about.

    Raises DataError for a side that is empty or no text (with the record's number, from 1), for no
    pairs at all and for a different source already there; ResourceError where the disk is full or
    not writable.
    """
    directory = Path(directory)
    if directory.exists():
        return _same_source(directory, name, tokenizer, origin)
    try:
        temporary = record_files.temporary_folder(directory)
    except OSError as error:
        raise _resource_error(directory, error) from error
    try:

        def stated() -> dict[str, Any]:
            return {"licence": licence, "language": list(language), "left_out": left_out()}

        manifest = _write_files(temporary, name, pairs, tokenizer, origin, stated, shard_bytes)
        temporary.chmod(0o755)
        record_files.sync(temporary)
        try:
            temporary.rename(directory)
            record_files.sync(directory.parent)
        except OSError as error:
            if not directory.is_dir():
                raise
            winner = _same_source(directory, name, tokenizer, origin)
            if winner.fingerprint != _fingerprint(manifest):
                raise DataError(
                    f"{directory}: another process wrote other content for source {name!r} at the "
                    "same time; did its files change meanwhile? Delete the folder and run again"
                ) from error
        return open_source(directory)
    except OSError as error:
        raise _resource_error(directory, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(
    folder: Path,
    name: str,
    pairs: Iterable[tuple[str, str]],
    tokenizer: TextTokenizer,
    origin: dict[str, Any],
    stated: Callable[[], dict[str, Any]],
    shard_bytes: int,
) -> dict[str, Any]:
    """Writes all files of a stored source and returns its manifest."""
    token_bytes = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    shards = record_files.ShardWriter(folder, shard_bytes)
    sidecars = {
        key: record_files.SidecarWriter(folder / f"{key}.npy", dtype)
        for key, dtype in SIDECARS.items()
    }
    tokens = {"query": 0, "document": 0}
    count, reported = 0, time.monotonic()
    try:
        for batch in _batches(pairs, name):
            sides = {}
            for side, texts in zip(("query", "document"), zip(*batch, strict=True), strict=True):
                sides[side], lengths = _encode(
                    list(texts), tokenizer, token_bytes, f"source {name!r}: {side}", count
                )
                sidecars[f"{side}_lengths"].add(lengths)
                sidecars[f"{side}_ids"].add([text_id(text) for text in texts])
                tokens[side] += sum(lengths)
            for query, document in zip(sides["query"], sides["document"], strict=True):
                shards.add(record_format.serialize(query, document))
            count += len(batch)
            if time.monotonic() - reported > _PROGRESS_SECONDS:
                reported = time.monotonic()
                _log.info("source %s: %d pairs tokenised", name, count)
    finally:
        shards.close()
        for sidecar in sidecars.values():
            sidecar.close()
    if not count:
        raise DataError(f"source {name!r} holds no pairs; point its path at files with records")
    names = shards.rename()
    metadata = record_format.tfds_metadata(name, shards.records, shards.total_bytes)
    for file, text in metadata.items():
        (folder / file).write_text(text, encoding="utf-8")
    files = [*names, *metadata, *(f"{key}.npy" for key in SIDECARS)]
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "name": name,
        "pairs": count,
        "tokens": tokens,
        "token_bytes": token_bytes,
        "prompts": PROMPTS,
        "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "records_sha256": shards.digest.hexdigest(),
        "shards": [
            {"file": file, "records": records}
            for file, records in zip(names, shards.records, strict=True)
        ],
        "origin": origin,
        **{key: value for key, value in stated().items() if value},
        "files": {file: record_files.file_facts(folder / file) for file in sorted(files)},
    }
    (folder / MANIFEST).write_text(record_format.to_json(manifest), encoding="utf-8")
    record_files.sync(folder / MANIFEST)
    return manifest


def _batches(pairs: Iterable[tuple[str, str]], name: str) -> Iterator[list[tuple[str, str]]]:
    """Batches of checked pairs, bounded in number and in characters."""
    batch: list[tuple[str, str]] = []
    characters = 0
    for number, (query, document) in enumerate(pairs, 1):
        for side, text in (("query", query), ("document", document)):
            problem = text_problem(text)
            if problem:
                raise DataError(f"source {name!r}, record {number}: {side} {problem}")
        batch.append((query, document))
        characters += len(query) + len(document)
        if len(batch) == _BATCH_PAIRS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(
    texts: list[str], tokenizer: TextTokenizer, token_bytes: int, what: str, offset: int
) -> tuple[list[bytes], list[int]]:
    """Token bytes and token counts of texts; `offset` is the number of records before the first."""
    encoded = tokenizer.encode(texts)
    dtype = np.dtype(f"<u{token_bytes}")
    lengths = [len(ids) for ids in encoded]
    if 0 in lengths:
        raise DataError(
            f"{what} of record {offset + lengths.index(0) + 1} has no tokens "
            f"({texts[lengths.index(0)][:40]!r}): remove the record"
        )
    if max(int(ids.max()) for ids in encoded) >= tokenizer.vocab_size:
        raise ValueError(f"{what}: the tokenizer gave an id outside its vocabulary")
    return [ids.astype(dtype).tobytes() for ids in encoded], lengths


def _fingerprint(manifest: dict[str, Any]) -> str:
    content = [
        manifest["pairs"],
        manifest["records_sha256"],
        manifest["token_bytes"],
        manifest["tokenizer"]["sha256"],
        *(manifest["files"][f"{name}.npy"]["sha256"] for name in SIDECARS),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _same_source(
    directory: Path, name: str, tokenizer: TextTokenizer, origin: dict[str, Any]
) -> StoredSource:
    """Opens the source already at `directory` if it is the one meant, else raises DataError."""
    source = open_source(directory)
    if source.manifest["tokenizer"]["sha256"] != tokenizer.sha256 or (
        (source.name, source.manifest["origin"]) != (name, json.loads(json.dumps(origin)))
    ):
        raise DataError(
            f"{directory}: already holds source {source.name!r} of another origin or tokenizer; "
            "choose another folder or delete this one"
        )
    return source


def _check_file(directory: Path, name: str, facts: dict[str, Any], verify: bool) -> None:
    if Path(name).name != name:
        raise DataError(f"{directory / MANIFEST}: {name!r} is not a plain file name")
    path = directory / name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: missing ({error.strerror}); write the source again") from error
    if size != facts["bytes"]:
        raise DataError(
            f"{path}: has {size} bytes, the manifest says {facts['bytes']}; the file is torn: "
            "write the source again"
        )
    if verify and record_files.file_facts(path)["sha256"] != facts["sha256"]:
        raise DataError(f"{path}: content does not match its SHA-256; write the source again")


def _resource_error(directory: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"{directory}: cannot write the stored source ({error.strerror or error}); free disk space "
        "or choose another folder with data.cache"
    )
