"""Real pairs for the benchmarks: docstrings of the installed packages, or a file that is given."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def pairs(file: Path | None, count: int | None = None) -> tuple[list[tuple[str, str]], str]:
    """(query, document) pairs and what they are; `count` of them, drawn without repeats.

    file: Parquet with columns query and document; None reads the docstrings that
    configs/quickstart.yaml trains on, of the versions installed here. Exits where there are fewer
    than `count`.
    """
    columns = ["query", "document"]
    return _some([_read(file, columns)] if file else _docstrings(columns), file, count)


def documents(file: Path | None, count: int | None = None) -> tuple[list[str], str]:
    """As `pairs`, documents only."""
    columns = ["document"]
    found, origin = _some([_read(file, columns)] if file else _docstrings(columns), file, count)
    return [document for (document,) in found], origin


def write(found: list[tuple[str, str]], file: Path) -> None:
    """Writes pairs in the form that `pairs` reads."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    queries, bodies = zip(*found, strict=True)
    parquet.write_table(pa.table({"query": list(queries), "document": list(bodies)}), file)


def _some(
    tables: list[list[tuple[Any, ...]]], file: Path | None, count: int | None
) -> tuple[list[tuple[Any, ...]], str]:
    found = [row for table in tables for row in table]
    origin = file.name if file else "docstrings of configs/quickstart.yaml"
    count = len(found) if count is None else count
    if len(found) < count:
        raise SystemExit(f"{origin}: holds {len(found)} pairs, {count} are wanted")
    chosen = np.random.default_rng(0).permutation(len(found))[:count]
    return [found[index] for index in chosen], f"{count} of {len(found)} pairs, {origin}"


def _docstrings(columns: list[str]) -> list[list[tuple[Any, ...]]]:
    from arcticjax.config import load_config
    from arcticjax.data import docstrings

    config = load_config(QUICKSTART).data.docstrings
    assert config is not None
    with tempfile.TemporaryDirectory() as scratch:
        sources = docstrings.extract(config, Path(scratch), 1).sources
        return [_read(Path(source.path), columns) for source in sources]


def _read(file: Path, columns: list[str]) -> list[tuple[Any, ...]]:
    import pyarrow.parquet as parquet

    table = parquet.read_table(file, columns=columns)
    return list(zip(*(table[column].to_pylist() for column in columns), strict=True))
