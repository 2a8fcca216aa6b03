"""Stored lists: tokenised queries with positives and candidates, for fine-tuning.

A folder of memory-mapped `.npy` files and `manifest.json`. Queries and documents are kept once
each, told apart by the id of their text, so that documents of equal text are one document. For
query q, `positives[positive_starts[q] : positive_starts[q + 1]]` are numbers of documents, with the
teacher's scores beside them (NaN = unknown); candidates likewise, best first. Where it is known of
which larger documents the documents are pieces, `document_parents` holds a 64-bit id of these for
each, 0 = none. Nothing is cut: which candidates become negatives is decided when batches are drawn
(`arcticjax.data.negatives`). The folder appears complete or not at all, and never changes.

Axis letters: Q queries, D documents, K candidates of a query, P positives of a query, H hashes of a
signature.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arcticjax.data import record_files, record_format
from arcticjax.data.negatives import Candidates, among
from arcticjax.data.record_files import SidecarWriter
from arcticjax.data.signatures import HASHES, signature
from arcticjax.data.stored import text_id, text_problem
from arcticjax.errors import DataError, ResourceError
from arcticjax.models.tokenizer import TextTokenizer

FORMAT = "arcticjax-lists"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"

_STARTS, _IDS, _NUMBERS, _SCORES = map(np.dtype, ("<i8", "<u8", "<i4", "<f4"))
_BATCH = 1024


class StoredLists:
    """Queries with their lists, memory-mapped; safe to share between threads.

    query_lengths, document_lengths: a text's own tokens; query_ids, document_ids: `text_id` of the
    texts. scored: whether candidates and positives have a teacher's scores.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.name: str = manifest["name"]
        self.scored: bool = manifest["scored"]
        self.fingerprint: str = manifest["fingerprint"]
        self._arrays = {
            name.removesuffix(".npy"): _mapped(directory / name) for name in manifest["files"]
        }
        self.query_ids = self._arrays["query_ids"]
        self.document_ids = self._arrays["document_ids"]
        self.query_lengths = np.diff(self._arrays["query_starts"])
        self.document_lengths = np.diff(self._arrays["document_starts"])
        self.parents_D: np.ndarray | None = self._arrays.get("document_parents")
        self.signatures_DH = self._arrays["document_signatures"].reshape(-1, HASHES)

    def __len__(self) -> int:
        """How many queries."""
        return len(self.query_ids)

    def queries(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Token ids of queries, without special tokens or prompt, uncut."""
        return self._texts("query", numbers)

    def documents(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Token ids of documents, without special tokens or prompt, uncut."""
        return self._texts("document", numbers)

    def lists(self, queries: np.ndarray) -> Candidates:
        """The lists of some queries side by side."""
        ids_QK, scores_QK = self._side_by_side("candidate", queries)
        positives_QP, positive_scores_QP = self._side_by_side("positive", queries)
        siblings_QK = None
        if self.parents_D is not None:
            parents_QK, parents_QP = (
                np.where(some >= 0, self.parents_D[some], 0) for some in (ids_QK, positives_QP)
            )
            siblings_QK = (parents_QK != 0) & among(parents_QK, parents_QP)
        return Candidates(
            ids_QK, scores_QK, positives_QP, positive_scores_QP, sibling_QK=siblings_QK
        )

    def _texts(self, side: str, numbers: np.ndarray) -> list[np.ndarray]:
        tokens, starts = self._arrays[f"{side}_tokens"], self._arrays[f"{side}_starts"]
        ends = starts[np.asarray(numbers) + 1].tolist()
        return [
            tokens[start:end] for start, end in zip(starts[numbers].tolist(), ends, strict=True)
        ]

    def _side_by_side(self, what: str, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = self._arrays[f"{what}_starts"]
        first_Q, ends_Q = starts[queries], starts[np.asarray(queries) + 1]
        width = max(1, int((ends_Q - first_Q).max(initial=0)))
        places_QK = first_Q[:, None] + np.arange(width)
        there_QK = places_QK < ends_Q[:, None]
        places_QK = np.where(there_QK, places_QK, 0)
        numbers, scores = self._arrays[f"{what}s"], self._arrays[f"{what}_scores"]
        if not len(numbers):
            return np.full(places_QK.shape, -1, np.int64), np.full(places_QK.shape, np.nan, _SCORES)
        return (
            np.where(there_QK, numbers[places_QK].astype(np.int64), -1),
            np.where(there_QK, scores[places_QK], np.float32(np.nan)),
        )


class ListWriter:
    """Writes the files of stored lists, in memory that grows with the number of texts alone.

    left_out: records of the source that were no lists, for the manifest; set by whoever read them.
    """

    def __init__(self, folder: Path, name: str, tokenizer: TextTokenizer) -> None:
        self.left_out = 0
        self._name = name
        self._tokenizer = tokenizer
        self._folder = folder
        self._sides = {side: _Texts(folder, side, tokenizer) for side in ("query", "document")}
        self._files = {
            f"{what}{ending}": SidecarWriter(folder / f"{what}{ending}.npy", dtype)
            for what in ("positive", "candidate")
            for ending, dtype in (("s", _NUMBERS), ("_scores", _SCORES), ("_starts", _STARTS))
        }
        self._parents: dict[int, int] = {}
        self._ends = {"positive": 0, "candidate": 0}
        self._lists = 0
        self._scored = True
        for what in self._ends:
            self._files[f"{what}_starts"].add([0])

    def close(self) -> None:
        """Closes all files, whole or not."""
        with contextlib.ExitStack() as stack:  # one that fails must not leave the others open
            for one in (*self._sides.values(), *self._files.values()):
                stack.callback(one.close)

    @property
    def query_count(self) -> int:
        """How many queries were seen."""
        return len(self._sides["query"])

    def query(self, text: str) -> int:
        """The number of a query, which it gets when it is first seen."""
        return self._sides["query"].text(text)

    def document(self, text: str) -> int:
        """The number of a document."""
        return self._sides["document"].text(text)

    def tokens(self, side: str, identity: int, tokens: np.ndarray) -> int:
        """The number of a query or document (`side`) whose tokens are known."""
        return self._sides[side].add(identity, tokens)

    def parent(self, document: int, parent: str | None) -> None:
        """Notes of which larger document, if any, a document is a piece; of several the first."""
        if parent is not None:
            self._parents.setdefault(document, text_id(parent))

    def lists(
        self,
        positives: Sequence[int] | np.ndarray,
        positive_scores: Sequence[float] | np.ndarray,
        candidates: Sequence[int] | np.ndarray,
        candidate_scores: Sequence[float] | np.ndarray,
    ) -> None:
        """The lists of the next query, in the order of the queries' numbers; candidates best
        first."""
        self._lists += 1
        for what, numbers, scores in (
            ("positive", positives, positive_scores),
            ("candidate", candidates, candidate_scores),
        ):
            scores = np.asarray(scores, _SCORES)
            self._scored &= not np.isnan(scores).any()
            self._ends[what] += len(numbers)
            self._files[f"{what}s"].add(numbers)
            self._files[f"{what}_scores"].add(scores)
            self._files[f"{what}_starts"].add([self._ends[what]])

    def finish(self) -> dict[str, Any]:
        """Closes all files, which are whole now; what the manifest says of them."""
        for side in self._sides.values():
            side.flush()
        if self._parents:
            numbers = range(len(self._sides["document"]))
            parents = SidecarWriter(self._folder / "document_parents.npy", _IDS)
            self._files["document_parents"] = parents
            parents.add([self._parents.get(number, 0) for number in numbers])
        self.close()
        queries, documents = (len(self._sides[side]) for side in ("query", "document"))
        if not queries:
            raise DataError(f"source {self._name!r} holds no queries; point its path at records")
        if self._lists != queries:
            raise ValueError(f"{self._lists} lists for {queries} queries")
        files = sorted(path.name for path in self._folder.glob("*.npy"))
        facts = {name: record_files.file_facts(self._folder / name) for name in files}
        content = [[name, facts[name]["sha256"]] for name in files]
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "name": self._name,
            "queries": queries,
            "documents": documents,
            "left_out": self.left_out,
            **{f"{what}s": count for what, count in self._ends.items()},
            "scored": self._scored and self._ends["candidate"] > 0,
            "tokenizer": {
                "sha256": self._tokenizer.sha256,
                "vocab_size": self._tokenizer.vocab_size,
            },
            "fingerprint": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
            "files": facts,
        }


class _Texts:
    """One side's texts: tokens laid end to end, ids, and for documents signatures."""

    def __init__(self, folder: Path, side: str, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._numbers: dict[int, int] = {}
        self._waiting: list[str | np.ndarray] = []
        width = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        kinds = {"tokens": np.dtype(width), "starts": _STARTS, "ids": _IDS}
        if side == "document":
            kinds["signatures"] = np.dtype("u1")
        self._files = {
            kind: SidecarWriter(folder / f"{side}_{kind}.npy", dtype)
            for kind, dtype in kinds.items()
        }
        self._end = 0
        self._files["starts"].add([0])

    def __len__(self) -> int:
        return len(self._numbers)

    def text(self, text: str) -> int:
        return self._number(text_id(text), text)

    def add(self, identity: int, tokens: np.ndarray) -> int:
        return self._number(identity, tokens)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _number(self, identity: int, content: str | np.ndarray) -> int:
        found = self._numbers.get(identity)
        if found is None:
            found = self._numbers[identity] = len(self._numbers)
            self._files["ids"].add([identity])
            self._waiting.append(content)
            if len(self._waiting) == _BATCH:
                self.flush()
        return found

    def flush(self) -> None:
        """Writes the texts that were still waiting for others to be tokenised with."""
        waiting, self._waiting = self._waiting, []
        encoded = iter(self._tokenizer.encode([one for one in waiting if isinstance(one, str)]))
        tokens = [next(encoded) if isinstance(one, str) else one for one in waiting]
        if not tokens:
            return
        ends = self._end + np.cumsum([len(one) for one in tokens])
        self._end = int(ends[-1])
        self._files["tokens"].add(np.concatenate(tokens))
        self._files["starts"].add(ends)
        if "signatures" in self._files:
            for one in tokens:
                self._files["signatures"].add(signature(one))


def write(
    directory: Path,
    name: str,
    tokenizer: TextTokenizer,
    fill: Callable[[ListWriter], None],
) -> StoredLists:
    """Opens the lists at `directory`, or has `fill` write them first.

    The folder is built beside its place and renamed into it; where another process was faster, its
    folder is used. Raises DataError for no queries, ResourceError where the disk is full.
    """
    if directory.exists():
        return open_lists(directory)
    try:
        temporary = record_files.temporary_folder(directory)
        try:
            with contextlib.closing(ListWriter(temporary, name, tokenizer)) as writer:
                fill(writer)
                manifest = writer.finish()
            (temporary / MANIFEST).write_text(record_format.to_json(manifest), encoding="utf-8")
            record_files.sync(temporary / MANIFEST)
            temporary.chmod(0o755)
            record_files.sync(temporary)
            try:
                temporary.rename(directory)
                record_files.sync(directory.parent)
            except OSError:
                if not directory.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ResourceError(
            f"{directory}: cannot write the lists of source {name!r} ({error.strerror or error}); "
            "free disk space or choose another folder with data.cache"
        ) from error
    return open_lists(directory)


def open_lists(directory: Path) -> StoredLists:
    """Opens stored lists; sizes of all files are checked. Raises DataError for a torn folder."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if (manifest["format"], manifest["version"]) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"format {manifest['format']!r}, version {manifest['version']!r}")
        for name, facts in manifest["files"].items():
            size = (directory / Path(name).name).stat().st_size
            if size != facts["bytes"]:
                raise ValueError(f"{name} has {size} bytes instead of {facts['bytes']}")
        return StoredLists(directory, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{directory}: these are no whole stored lists ({error}); delete the folder, it is "
            "made again"
        ) from error


def checked_texts(values: Iterable[object], where: str) -> list[str]:
    """Texts that can be trained on; DataError says which is none."""
    texts = list(values)
    for value in texts:
        problem = text_problem(value)
        if problem:
            raise DataError(f"{where}: a text {problem}")
    return [str(text) for text in texts]


def _mapped(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
