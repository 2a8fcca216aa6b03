"""Pairs from the docstrings of installed Python packages: summary line -> body.

Text that every machine has, in one source per package, with packages held out for evaluation.
Source files are read and parsed; nothing is imported or executed. What comes out depends on the
installed versions and the config only: neither on paths nor on the order of files.
"""

from __future__ import annotations

import ast
import difflib
import gc
import hashlib
import inspect
import json
import logging
import platform
import re
import shutil
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from arcticjax.config import DocstringsConfig, SourceConfig
from arcticjax.data.installed import installed_distributions, package_files
from arcticjax.data.near_duplicates import NearDuplicates, words_of
from arcticjax.errors import ConfigError, DataError, ResourceError

# Part of the cache key: raise it with any change to what is extracted.
RULES = 1

_log = logging.getLogger(__name__)

POOLED = "others"  # the source that small packages share

SUMMARY_WORDS = (3, 60)
MIN_BODY_WORDS = 10
MAX_FILE_BYTES = 1_000_000

_GENERATED = re.compile(
    r"^#.*(?:auto-?generated|do not edit|generated (?:by|from)\b)", re.IGNORECASE | re.MULTILINE
)
_HEADING_LINE = re.compile(r"^\s*([^\w\s])\1{2,}\s*$", re.MULTILINE)
_SENTENCE_END = re.compile(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)[.!?](?=\s+[^a-z\s]|\s*$)"
)
_SURROGATE = re.compile("[\ud800-\udfff]")  # an escape in a literal can make text that has no UTF-8
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DOCUMENTED = (ast.Module, ast.ClassDef, *_FUNCTIONS)
_BLOCKS = (ast.If, ast.Try, ast.ExceptHandler, ast.With)

Pairs = dict[str, list[tuple[str, str]]]  # (summary, body) by package


@dataclass(frozen=True)
class DocstringPairs:
    """What was extracted.

    sources: one Parquet file (columns query, document) per training package with enough pairs, and
        `others` with the rest.
    task_folder: BEIR folder of the held-out packages; None when none is held out.
    counts: pairs taken from each training package; held_out_counts: from each held-out one.
    """

    sources: list[SourceConfig]
    task_folder: Path | None
    counts: dict[str, int]
    held_out_counts: dict[str, int]


def extract(config: DocstringsConfig, cache: Path, minimum: int) -> DocstringPairs:
    """The pairs of the packages that `config` names, from `cache` if this was done before.

    `minimum` is the number of pairs below which a package shares a source, unless
    `config.min_pairs` gives it. The cache is keyed by the config, the version of Python and the
    names and versions of all installed distributions. Raises ConfigError for a package that is not
    installed, DataError if the held-out or the training packages have no pairs, ResourceError if
    `cache` cannot be written.
    """
    minimum = config.min_pairs or minimum
    folder = Path(cache) / _cache_key(config, minimum)
    if _is_complete(folder):
        return _open(folder)
    _log.info("docstrings: reading the source of installed packages into %s", folder)
    training, held_out = _collect(config)
    try:
        _publish(folder, training, held_out, minimum)
    except OSError as error:
        raise ResourceError(
            f"data.cache: the docstrings cannot be written to {folder}: {error}; free space, or "
            "set data.cache to a folder that can be written"
        ) from error
    return _open(folder)


def pairs_in(text: str) -> Iterator[tuple[str, str]]:
    """(summary, body) of every docstring in Python source `text` that makes a useful pair.

    Looks at the module, its classes and functions and those in classes, conditionals and `try`, not
    inside functions. Text that does not parse has none.
    """
    if not ('"""' in text or "'''" in text) or _GENERATED.search(text[:1000]):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    pending: list[ast.AST] = [module]
    while pending:
        node = pending.pop()
        if isinstance(node, _DOCUMENTED):
            docstring = ast.get_docstring(node, clean=False)
            if docstring and (pair := split_docstring(docstring)):
                yield pair
        if not isinstance(node, _FUNCTIONS):
            for field in ("body", "orelse", "handlers", "finalbody"):
                pending.extend(
                    child
                    for child in getattr(node, field, ())
                    if isinstance(child, _DOCUMENTED + _BLOCKS)
                )


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """The first sentence of a docstring and the rest, white space folded; None if it is no pair.

    The sentence ends with the first paragraph at the latest. Underlines of headings are left out.
    No pair: a summary that is too short or long, or not prose, or repeated in the body; a body that
    is too short.
    """
    paragraphs = _HEADING_LINE.sub("", inspect.cleandoc(docstring)).strip().split("\n\n", 1)
    first = " ".join(paragraphs[0].split())
    end = _SENTENCE_END.search(first)
    cut = end.end() if end else len(first)
    summary = first[:cut]
    body = " ".join([first[cut:], *paragraphs[1:]])
    body = " ".join(body.split())
    fewest, most = SUMMARY_WORDS
    if not fewest <= len(summary.split()) <= most or len(body.split()) < MIN_BODY_WORDS:
        return None
    letters = sum(map(str.isalpha, summary))
    if len(words_of(summary)) < fewest or letters < 0.7 * len(summary.replace(" ", "")):
        return None
    if summary.rstrip(".!?: ").casefold() in body.casefold():
        return None
    if _SURROGATE.search(docstring):
        return None
    return summary, body


def _read_pairs(files: Iterable[Path]) -> list[tuple[str, str]]:
    """All pairs of the files, in an order that depends on the pairs alone."""
    pairs: set[tuple[str, str]] = set()
    for path in files:
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                continue
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            continue
        pairs.update(pairs_in(text))
    return sorted(pairs, key=_order)


def _order(pair: tuple[str, str]) -> bytes:
    """A stable hash of a pair: sorting by it is a shuffle, and a prefix of it a fair sample."""
    return hashlib.blake2b("\0".join(pair).encode(), digest_size=16, person=b"docstrings").digest()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees hold no cycles, and looking for some takes three quarters of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Novel:
    """Lets a pair through unless its summary, or nearly its body, was met in any package before."""

    def __init__(self) -> None:
        self._summaries: set[str] = set()
        self._bodies = NearDuplicates()

    def __call__(self, pair: tuple[str, str]) -> bool:
        summary = " ".join(words_of(pair[0]))
        if summary in self._summaries or not self._bodies.add(pair[1]):
            return False
        self._summaries.add(summary)
        return True


def _collect(config: DocstringsConfig) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs by package, duplicates left out and caps applied."""
    files = package_files()
    held_out_names = sorted(set(config.held_out))
    listed = sorted(files) if config.packages == "installed" else sorted(set(config.packages))
    _require("data.docstrings.held_out", held_out_names, files)
    _require("data.docstrings.packages", listed, files)
    novel = _Novel()
    held_out: Pairs = {name: [] for name in held_out_names}
    training: Pairs = {}
    with _no_garbage_collection():
        # Held-out pairs first: what nearly equals one of them is then left out of training.
        candidates = [(pair, name) for name in held_out_names for pair in _read_pairs(files[name])]
        candidates.sort(key=lambda candidate: _order(candidate[0]))
        for pair, name in _take(config.max_documents, candidates, novel):
            held_out[name].append(pair)
        for name in listed:
            if name not in held_out:
                found = [(pair, name) for pair in _read_pairs(files[name])]
                training[name] = [pair for pair, _ in _take(config.max_pairs, found, novel)]
    for name in held_out:
        if not any(package == name for _, package in candidates):
            raise DataError(
                f"data.docstrings.held_out: the package {name!r} has no docstring that makes a "
                "pair; hold out another"
            )
    if not any(training.values()):
        raise DataError(
            "data.docstrings.packages: no docstring of these packages makes a pair; list others"
        )
    return training, held_out


def _take(
    most: int, candidates: Iterable[tuple[tuple[str, str], str]], novel: _Novel
) -> Iterator[tuple[tuple[str, str], str]]:
    """The first `most` candidates (pair, package) that are novel."""
    taken = 0
    for candidate in candidates:
        if taken == most:
            return
        if novel(candidate[0]):
            taken += 1
            yield candidate


def _require(field: str, names: Sequence[str], files: Mapping[str, object]) -> None:
    for name in names:
        if name not in files:
            nearest = difflib.get_close_matches(name, files, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{field}: no installed package has the import name {name!r}; the nearest is "
                f"{nearest!r}; install it or list another (import names, such as yaml for PyYAML)"
            )


def _pool(training: Pairs, minimum: int) -> Pairs:
    """Packages with fewer than `minimum` pairs under one name, and the rest as they are.

    Where the small ones together are still too few, the next smallest packages join them.
    """
    found = [name for name, pairs in training.items() if pairs]
    by_size = sorted(found, key=lambda name: (len(training[name]), name))
    members: list[str] = []
    total = 0
    for name in by_size:
        if len(training[name]) >= minimum and (not members or total >= minimum):
            break
        members.append(name)
        total += len(training[name])
    if len(members) < 2:
        members = []
    sources = {name: training[name] for name in sorted(found) if name not in members}
    if members:
        sources[POOLED] = sorted((pair for name in members for pair in training[name]), key=_order)
    return sources


def _cache_key(config: DocstringsConfig, minimum: int) -> str:
    identity = {
        "rules": RULES,
        "config": config.model_dump(mode="json"),
        "minimum": minimum,
        "python": platform.python_version(),
        "distributions": installed_distributions(),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _publish(folder: Path, training: Pairs, held_out: Pairs, minimum: int) -> None:
    """Writes everything beside `folder`, then renames: no reader sees half of it."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        sources = _pool(training, minimum)
        for name, pairs in sources.items():
            queries, documents = zip(*pairs, strict=True)
            table = pa.table({"query": pa.array(queries), "document": pa.array(documents)})
            parquet.write_table(table, temporary / f"{name}.parquet", compression="zstd")
        if held_out:
            _write_task(temporary / "task", held_out)
        manifest = {
            "sources": {name: len(pairs) for name, pairs in sources.items()},
            "counts": {name: len(pairs) for name, pairs in training.items()},
            "held_out_counts": {name: len(pairs) for name, pairs in held_out.items()},
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if folder.exists() and not _is_complete(folder):
            shutil.rmtree(folder)
        try:
            temporary.rename(folder)
        except OSError:
            if not _is_complete(folder):  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_task(folder: Path, held_out: Pairs) -> None:
    """A retrieval task in BEIR's layout: the one relevant document of a summary is its own body."""
    (folder / "qrels").mkdir(parents=True)
    with (
        open(folder / "corpus.jsonl", "w", encoding="utf-8") as corpus,
        open(folder / "queries.jsonl", "w", encoding="utf-8") as queries,
        open(folder / "qrels" / "test.tsv", "w", encoding="utf-8") as qrels,
    ):
        qrels.write("query-id\tcorpus-id\tscore\n")
        for name, pairs in held_out.items():
            for number, (query, document) in enumerate(pairs):
                # Not the same id: scorers leave out a document whose id equals the query's.
                query_id, document_id = f"{name}-{number}-summary", f"{name}-{number}-body"
                corpus.write(json.dumps({"_id": document_id, "title": "", "text": document}) + "\n")
                queries.write(json.dumps({"_id": query_id, "text": query}) + "\n")
                qrels.write(f"{query_id}\t{document_id}\t1\n")


def _is_complete(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = [f"{name}.parquet" for name in manifest["sources"]]
        if manifest["held_out_counts"]:
            files += ["task/corpus.jsonl", "task/queries.jsonl", "task/qrels/test.tsv"]
    except (OSError, ValueError, KeyError):
        return False
    return all((folder / name).is_file() for name in files)


def _open(folder: Path) -> DocstringPairs:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return DocstringPairs(
        sources=[
            SourceConfig(name=name, path=str(folder / f"{name}.parquet"))
            for name in manifest["sources"]
        ],
        task_folder=folder / "task" if manifest["held_out_counts"] else None,
        counts=manifest["counts"],
        held_out_counts=manifest["held_out_counts"],
    )
