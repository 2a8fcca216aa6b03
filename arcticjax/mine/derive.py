"""New candidates from stored ones: other scores for some pairs, or several teachers' lists as one.

Neither embeds anything. Both write a new folder and leave the old ones as they are.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from arcticjax.data import candidates, record_files
from arcticjax.data.candidates import CandidateFolder, Candidates, Group
from arcticjax.errors import ConfigError, DataError
from arcticjax.mine.files import explained, write_json

# Queries of a written file.
SHARD = 8192
_COLUMNS = ("query_id", "document_id", "score")

Scores = Mapping[Any, Mapping[Any, float]]


def relabel(folder: CandidateFolder, scores: Path, output: Path) -> int:
    """Copies candidates with the scores of a file (Parquet: query_id, document_id, score) in place
    of the teacher's, for candidates and positives alike; returns how many were replaced.

    Raises DataError where the file is unreadable, lacks a column, or names no pair of the folder.
    """
    given = _read_scores(scores)
    replaced = 0

    def changed(group: Group) -> Iterator[Candidates]:
        nonlocal replaced
        for batch in folder.batches(group):
            lists, count = _replaced(batch, given)
            replaced += count
            yield lists

    relabelled = {"sha256": record_files.file_facts(scores)["sha256"]}
    manifest = {**folder.manifest, "relabelled": relabelled}
    with _writing(output, manifest) as write:
        for group in folder.groups:
            write(group, changed(group))
        if not replaced:
            raise DataError(
                f"{scores}: names no query and document that {folder.directory} has together; "
                "ids are those of its columns, of the same type"
            )
    return replaced


def merge(folders: Sequence[CandidateFolder], output: Path) -> None:
    """Writes the union of several teachers' candidates of the same queries and documents, scored by
    the mean over the teachers; where one did not list a document, it counts with that teacher's
    last score, the most it can have given.

    Raises ConfigError where the folders hold different groups, or texts.
    """
    first = folders[0]
    contents = [[(group.name, group.sha256) for group in one.groups] for one in folders]
    for one, content in zip(folders, contents, strict=True):
        if content != contents[0]:
            raise ConfigError(
                f"--merge: {one.directory} was mined from other inputs than {first.directory}: "
                "lists are merged of the same queries and documents only"
            )
    teachers = [one.manifest["teacher"] for one in folders]
    names = " + ".join(teacher["name"] for teacher in teachers)
    manifest = {
        **first.manifest,
        "teacher": {**teachers[0], "name": names, "merged": teachers},
        "top_k": max(one.top_k for one in folders),
    }
    with _writing(output, manifest) as write:
        for number, group in enumerate(first.groups):
            rows = [_rows(one, one.groups[number]) for one in folders]
            write(group, (_merged(several) for several in zip(*rows, strict=True)))


def _read_scores(path: Path) -> Scores:
    try:
        table = parquet.read_table(path, columns=list(_COLUMNS))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(
            f"{path}: cannot be read as Parquet with the columns {', '.join(_COLUMNS)} "
            f"({' '.join(str(error).split())[:200]})"
        ) from error
    found: dict[Any, dict[Any, float]] = {}
    columns = (table.column(name).to_pylist() for name in _COLUMNS)
    for number, (query, document, score) in enumerate(zip(*columns, strict=True), 1):
        if query is None or document is None or score is None or not np.isfinite(score):
            raise DataError(f"{path}, row {number}: an id or the score is missing or not finite")
        found.setdefault(query, {})[document] = float(score)
    return found


def _replaced(batch: Candidates, given: Scores) -> tuple[Candidates, int]:
    queries = batch.query_ids.tolist()
    rows = [number for number, query in enumerate(queries) if query in given]
    if not rows:
        return batch, 0
    values = {name: getattr(batch, name).copy() for name in vars(batch)}
    count = 0
    for number in rows:
        own = given[queries[number]]
        for side in ("candidate", "positive"):
            ids, scores = values[f"{side}_ids"], values[f"{side}_scores"]
            part = slice(*values[f"{side}_starts"][number : number + 2])
            known = ids[part].tolist()
            count += sum(one in own for one in known)
            new = np.array(
                [own.get(one, old) for one, old in zip(known, scores[part], strict=True)],
                np.float32,
            )
            order = _best_first(ids[part], new)
            ids[part], scores[part] = ids[part][order], new[order]
    return Candidates(**values), count


def _rows(folder: CandidateFolder, group: Group) -> Iterator[tuple[Any, ...]]:
    """One query at a time: its id, candidate ids and scores, positive ids and scores."""
    for batch in folder.batches(group):
        for number, query in enumerate(batch.query_ids.tolist()):
            first = slice(*batch.candidate_starts[number : number + 2])
            second = slice(*batch.positive_starts[number : number + 2])
            yield (
                query,
                batch.candidate_ids[first],
                batch.candidate_scores[first],
                batch.positive_ids[second],
                batch.positive_scores[second],
            )


def _merged(several: Sequence[tuple[Any, ...]]) -> Candidates:
    """One query's lists of all teachers as one."""
    query, kind = several[0][0], several[0][1].dtype
    lists = []
    for side in (1, 3):
        ids = np.unique(np.concatenate([one[side] for one in several]))
        given = []
        for one in several:
            listed, scores = one[side], one[side + 1]
            if len(listed):
                given.append(np.full(len(ids), scores[-1], np.float64))
                given[-1][np.searchsorted(ids, listed)] = scores
        mean = np.mean(given, axis=0).astype(np.float32) if given else np.zeros(0, np.float32)
        order = _best_first(ids, mean)
        lists += [ids[order], mean[order], np.array([0, len(ids)])]
    ids = np.array([query], kind)
    return Candidates(ids, *lists)


def _best_first(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The order of descending scores, equal ones by ascending id."""
    by_id = np.argsort(ids, kind="stable")
    return by_id[np.argsort(-scores[by_id], kind="stable")]


@contextlib.contextmanager
def _writing(output: Path, manifest: Mapping[str, Any]) -> Iterator[Any]:
    """Gives a function that writes a group's lists; the manifest follows at the end, and the folder
    appears whole or, where anything fails, not at all."""
    output = output.expanduser()
    if (output / candidates.MANIFEST).exists():
        raise ConfigError(f"output: {output} holds candidates already; set another folder")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"output: {output} is no empty folder; set another one")
    with explained(output):
        temporary = record_files.temporary_folder(output.absolute())
    names: dict[str, list[str]] = {}

    def write(group: Group, lists: Iterator[Candidates]) -> None:
        names[group.name] = []
        for shard in itertools.count():
            held, queries = [], 0
            for part in lists:
                held.append(part)
                queries += len(part)
                if queries >= SHARD:
                    break
            if not held:
                return
            path = temporary / candidates.file_name(group.name, shard)
            with explained(path):
                candidates.write_shard(path, candidates.concatenate(held), group.kind)
            names[group.name].append(path.name)

    try:
        yield write
        files = itertools.chain(*names.values())
        groups = [{**group, "files": names[group["name"]]} for group in manifest["groups"]]
        facts = {name: record_files.file_facts(temporary / name) for name in files}
        write_json(temporary / candidates.MANIFEST, {**manifest, "groups": groups, "files": facts})
        with explained(output):
            temporary.chmod(0o755)  # temporary folders are private
            temporary.rename(output)
            record_files.sync(output.absolute().parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
