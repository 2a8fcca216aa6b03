"""Mined candidates on disk: for each query the documents a teacher ranks highest, with scores.

A folder holds Parquet files `candidates-GROUP-NNNNN.parquet` of five columns and `manifest.json`,
which is written last. A group is a set of queries that were mined against one corpus: one group for
each input, or a single one where inputs share a corpus. Which candidates become negatives is
decided by whoever reads them; nothing here is cut by score.

    query_id          uint64 | string
    candidate_ids     list of the same; best first, documents of equal score by ascending id;
                      a place in the list, from 1, is the candidate's rank
    candidate_scores  list of float32, descending: the teacher's cosines
    positive_ids      list of the ids of the query's known positives, as ordered as candidates are
    positive_scores   list of float32, descending

Candidates are the query's `top_k` best documents of the corpus, of which its positives and a
document that is the query's own text are left out, so they may be fewer. A positive was among those
best if it scores no less than the last candidate. Equal texts have one id. Ids are of one
kind in a group: `text` are 64-bit ids of texts (`stored.text_id`, what the sidecars of stored
sources hold), `own` are a BEIR folder's own ids (of equal documents the first by code point).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from arcticjax.data import record_files
from arcticjax.errors import DataError

FORMAT = "arcticjax-candidates"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
COLUMNS = ("query_id", "candidate_ids", "candidate_scores", "positive_ids", "positive_scores")

IdKind = Literal["text", "own"]

# Queries of a Parquet row group, which is what a reader holds at once: 12 MB at 1,000 candidates.
_ROW_GROUP = 1024


@dataclass(frozen=True)
class Candidates:
    """Mined lists of Q queries, laid end to end.

    The candidates of query q are `candidate_ids[candidate_starts[q] : candidate_starts[q + 1]]`
    with their scores, best first; its positives likewise. ids: uint64 for kind `text`, Python
    strings in an object array for `own`; scores: float32; starts: int64 [Q + 1], the first is 0.
    """

    query_ids: np.ndarray
    candidate_ids: np.ndarray
    candidate_scores: np.ndarray
    candidate_starts: np.ndarray
    positive_ids: np.ndarray
    positive_scores: np.ndarray
    positive_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.query_ids)


@dataclass(frozen=True)
class Group:
    """Queries that were mined against one corpus.

    sources: names of the inputs its queries come from. queries, documents: how many, each text
    counted once. sha256: over the inputs' content.
    """

    name: str
    sources: tuple[str, ...]
    kind: IdKind
    queries: int
    documents: int
    sha256: str
    files: tuple[str, ...]


class CandidateFolder:
    """A finished folder of candidates.

    manifest: what the program that mined wrote, among it `teacher` (name, sha256, contract) and
    `top_k`. fingerprint: hex digest of the content; the same wherever the folder lies.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.top_k: int = manifest["top_k"]
        self.groups = tuple(
            Group(
                group["name"],
                tuple(group["sources"]),
                group["kind"],
                group["queries"],
                group["documents"],
                group["sha256"],
                tuple(group["files"]),
            )
            for group in manifest["groups"]
        )
        content = sorted((name, facts["sha256"]) for name, facts in manifest["files"].items())
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def group_of(self, source: str) -> Group:
        """The group that holds the queries of an input; DataError naming the inputs there are."""
        for group in self.groups:
            if source in group.sources:
                return group
        names = ", ".join(name for group in self.groups for name in group.sources)
        raise DataError(
            f"{self.directory}: nothing was mined for a source {source!r}; it has {names}: mine "
            "the source under this name, or rename it"
        )

    def batches(self, group: Group) -> Iterator[Candidates]:
        """The group's lists in the order of its queries, some megabytes at a time."""
        for name in group.files:
            path = self.directory / name
            try:
                with parquet.ParquetFile(path) as file:
                    for batch in file.iter_batches(_ROW_GROUP, columns=list(COLUMNS)):
                        yield _from_batch(batch)
            except (pa.ArrowException, OSError, KeyError) as error:
                raise DataError(
                    f"{path}: cannot be read as candidates ({error}); the file is damaged: mine "
                    "into another folder"
                ) from error

    def read(self, group: Group) -> Candidates:
        """All lists of a group at once: 12 bytes a candidate, and more for ids of kind `own`."""
        return concatenate(list(self.batches(group)))


def open_candidates(directory: Path | str, *, verify: bool = False) -> CandidateFolder:
    """Opens a finished folder; sizes of all files are checked, and with `verify` their SHA-256 too.

    Raises DataError where the folder is unfinished, torn or of an unknown version.
    """
    directory = Path(directory).expanduser()
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{directory}: holds no finished candidates ({MANIFEST} is missing); run the mining "
            "command again, it goes on where it stopped"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); mine into another folder") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: is not the manifest of mined candidates (format {FORMAT!r})")
    if manifest.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {manifest.get('version')!r} is unknown, this program reads "
            f"{FORMAT_VERSION}; update arcticjax or mine again"
        )
    try:
        for name, facts in manifest["files"].items():
            _check_file(directory, name, facts, verify)
        return CandidateFolder(directory, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: lacks or distorts {error}; mine into another folder") from error


def file_name(group: str, shard: int) -> str:
    """The file of a group's queries number `shard`."""
    return f"candidates-{group}-{shard:05d}.parquet"


def write_shard(path: Path, candidates: Candidates, kind: IdKind) -> None:
    """Writes lists as one Parquet file that appears whole or not at all; equal lists give equal
    bytes."""
    ids = pa.uint64() if kind == "text" else pa.string()

    def lists(values: np.ndarray, starts: np.ndarray, of: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(values, of))

    table = pa.table(
        [
            pa.array(candidates.query_ids, ids),
            lists(candidates.candidate_ids, candidates.candidate_starts, ids),
            lists(candidates.candidate_scores, candidates.candidate_starts, pa.float32()),
            lists(candidates.positive_ids, candidates.positive_starts, ids),
            lists(candidates.positive_scores, candidates.positive_starts, pa.float32()),
        ],
        names=list(COLUMNS),
    )
    temporary = path.with_name(f".{path.name}.tmp")
    parquet.write_table(
        table, temporary, row_group_size=_ROW_GROUP, compression="zstd", use_dictionary=False
    )
    record_files.sync(temporary)
    temporary.replace(path)
    record_files.sync(path.parent)


def concatenate(parts: Sequence[Candidates]) -> Candidates:
    """Several lists of one kind of ids as one, in their order."""
    if len(parts) == 1:
        return parts[0]

    def values(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts]) if parts else np.empty(0)

    def starts(name: str) -> np.ndarray:
        sizes = [np.diff(getattr(part, name)) for part in parts]
        return np.concatenate([[0], np.cumsum(np.concatenate(sizes))] if sizes else [[0]])

    return Candidates(
        values("query_ids"),
        values("candidate_ids"),
        values("candidate_scores"),
        starts("candidate_starts"),
        values("positive_ids"),
        values("positive_scores"),
        starts("positive_starts"),
    )


def _from_batch(batch: pa.RecordBatch) -> Candidates:
    candidate_ids, candidate_starts = _flat(batch.column("candidate_ids"))
    candidate_scores, _ = _flat(batch.column("candidate_scores"))
    positive_ids, positive_starts = _flat(batch.column("positive_ids"))
    positive_scores, _ = _flat(batch.column("positive_scores"))
    return Candidates(
        batch.column("query_id").to_numpy(zero_copy_only=False),
        candidate_ids,
        candidate_scores,
        candidate_starts,
        positive_ids,
        positive_scores,
        positive_starts,
    )


def _flat(lists: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values laid end to end, and where each list starts."""
    starts = lists.offsets.to_numpy().astype(np.int64)
    return lists.flatten().to_numpy(zero_copy_only=False), starts - starts[0]


def _check_file(directory: Path, name: str, facts: dict[str, Any], verify: bool) -> None:
    if Path(name).name != name:
        raise DataError(f"{directory / MANIFEST}: {name!r} is not a plain file name")
    path = directory / name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{path}: missing ({error.strerror}); put it back or mine into another folder"
        ) from error
    if size != facts["bytes"]:
        raise DataError(
            f"{path}: has {size} bytes, the manifest says {facts['bytes']}; the file is torn: put "
            "a whole copy back or mine into another folder"
        )
    if verify and record_files.file_facts(path)["sha256"] != facts["sha256"]:
        raise DataError(f"{path}: content does not match its SHA-256; mine into another folder")
