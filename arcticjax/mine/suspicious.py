"""The candidates that are probably relevant, with their texts, for another judge to score.

One Parquet file, whose ids `--relabel` takes as they are:

    query_id, document_id  uint64 | string, as in the candidates
    score                  the teacher's
    query, document        the texts, as the inputs have them
    signs                  list of string: what makes a candidate suspicious
                           (`false_negatives.SIGNS`); of the query's positives, which come first,
                           `positive`
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from arcticjax.config import InputConfig
from arcticjax.data import adapters, stored, training_sets
from arcticjax.data.candidates import CandidateFolder, Candidates, Group
from arcticjax.errors import ConfigError, DataError
from arcticjax.mine.false_negatives import signs
from arcticjax.mine.files import explained, write_whole
from arcticjax.mine.inputs import BEIR, is_beir, pairs_of

POSITIVE = "positive"
# Rows that are written at once.
_ROWS = 8192

Row = tuple[Any, Any, float, str, str, list[str]]


def write_suspicious(
    folder: CandidateFolder,
    groups: Sequence[Group],
    inputs: Sequence[InputConfig],
    output: Path,
    depth: int,
) -> tuple[int, int]:
    """Writes the suspicious among the first `depth` candidates of every query, and the positives of
    such queries; returns how many candidates and queries. The texts that are compared are in memory
    meanwhile, of one group at a time.

    Raises ConfigError for groups with several kinds of ids, or where `output` is there already;
    DataError where the inputs do not hold the texts that were mined.
    """
    kinds = {group.kind for group in groups}
    if len(kinds) > 1:
        names = ", ".join(group.name for group in groups)
        raise ConfigError(
            f"--suspicious: {folder.directory} has ids of texts and a BEIR folder's own, and one "
            f"file holds one kind; choose a group with --group ({names})"
        )
    if output.exists():
        raise ConfigError(f"--output: {output} is there already; name a Parquet file to be written")
    ids = pa.uint64() if kinds == {"text"} else pa.string()
    schema = pa.schema(
        [
            ("query_id", ids),
            ("document_id", ids),
            ("score", pa.float32()),
            ("query", pa.string()),
            ("document", pa.string()),
            ("signs", pa.list_(pa.string())),
        ]
    )
    found = {"candidates": 0, "queries": 0}

    def write(file: Any) -> None:
        with parquet.ParquetWriter(file, schema, compression="zstd") as table:
            waiting: list[Row] = []
            for group in groups:
                for rows in _queries(folder, group, inputs, depth):
                    found["queries"] += 1
                    found["candidates"] += sum(row[-1] != [POSITIVE] for row in rows)
                    waiting += rows
                    if len(waiting) >= _ROWS:
                        table.write_table(_table(waiting, schema))
                        waiting.clear()
            table.write_table(_table(waiting, schema))

    with explained(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, write)
    return found["candidates"], found["queries"]


def _table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else ([] for _ in schema)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _queries(
    folder: CandidateFolder, group: Group, inputs: Sequence[InputConfig], depth: int
) -> Iterator[list[Row]]:
    """The rows of each query that has a suspicious candidate."""
    queries: dict[Any, str | None] = {}
    documents: dict[Any, str | None] = {}
    for batch in folder.batches(group):
        queries.update(dict.fromkeys(batch.query_ids.tolist()))
        for number in range(len(batch)):
            for side in ("positive", "candidate"):
                documents.update(dict.fromkeys(_ids(batch, side, number, depth)))
    for one in _of_group(folder, group, inputs):
        _read_texts(one, group, queries, documents)
    missing = [one for some in (queries, documents) for one, text in some.items() if text is None]
    if missing:
        raise DataError(
            f"{folder.directory}: the inputs of {group.name!r} lack {len(missing)} texts that were "
            f"mined, such as {missing[0]!r}; they were changed or moved: give --config FILE with "
            "inputs that hold them"
        )
    for batch in folder.batches(group):
        for number, query in enumerate(batch.query_ids.tolist()):
            text = queries[query] or ""
            known, others = (
                [
                    (one, score, documents[one] or "")
                    for one, score in zip(
                        _ids(batch, side, number, depth),
                        _scores(batch, side, number, depth),
                        strict=True,
                    )
                ]
                for side in ("positive", "candidate")
            )
            shown = signs(
                text,
                [document for _, _, document in known],
                known[0][1],
                [document for _, _, document in others],
                [score for _, score, _ in others],
            )
            if any(shown):
                yield [
                    *((query, one, score, text, body, [POSITIVE]) for one, score, body in known),
                    *(
                        (query, one, score, text, body, some)
                        for (one, score, body), some in zip(others, shown, strict=True)
                        if some
                    ),
                ]


def _ids(batch: Candidates, side: str, number: int, depth: int) -> list[Any]:
    return getattr(batch, f"{side}_ids")[_part(batch, side, number, depth)].tolist()


def _scores(batch: Candidates, side: str, number: int, depth: int) -> list[float]:
    return getattr(batch, f"{side}_scores")[_part(batch, side, number, depth)].tolist()


def _part(batch: Candidates, side: str, number: int, depth: int) -> slice:
    """The places of a query's positives, all of them, or of its first candidates."""
    start, end = getattr(batch, f"{side}_starts")[number : number + 2].tolist()
    return slice(start, end if side == "positive" else min(end, start + depth))


def _of_group(
    folder: CandidateFolder, group: Group, inputs: Sequence[InputConfig]
) -> list[InputConfig]:
    by_name = {one.name: one for one in inputs}
    lacking = [name for name in group.sources if name not in by_name]
    if lacking:
        raise ConfigError(
            f"--suspicious: {folder.directory} does not say where its input {lacking[0]!r} is, and "
            "no config does; give --config FILE with the inputs that were mined"
        )
    return [by_name[name] for name in group.sources]


def _read_texts(
    one: InputConfig, group: Group, queries: dict[Any, str | None], documents: dict[Any, str | None]
) -> None:
    """Sets the texts of the ids that an input holds."""
    source = pairs_of(one)
    if group.kind == "own":
        if is_beir(one) and not one.path.startswith(BEIR):
            source = source.model_copy(update={"path": BEIR + one.path})
        root = training_sets.beir_folder(source)
        for known, what in ((queries, "queries"), (documents, "corpus")):
            for identity, text in training_sets.beir_texts(source, root, what):
                if identity in known:
                    known[identity] = text
        return
    for path in (one.path, one.corpus):
        if path is None or not stored.has_own_manifest(Path(path).expanduser()):
            continue
        raise ConfigError(
            f"--suspicious: input {one.name!r}, {path}, is a stored source, which holds tokens "
            "and no texts; give --config FILE with the files it was made from, their ids are the "
            "same"
        )
    for pair in adapters.read_pairs(source):
        _note(zip((queries, documents), pair, strict=True))
    corpus = adapters.corpus_of(one)
    if corpus is not None:
        for _, text in adapters.read_pairs(corpus):
            _note([(documents, text)])


def _note(found: Iterable[tuple[dict[Any, str | None], str]]) -> None:
    for known, text in found:
        identity = stored.text_id(text)
        if identity in known:
            known[identity] = text
