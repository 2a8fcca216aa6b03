"""The catalog: tokenised once, small sources, weights, merged views and the fingerprint."""

import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from arcticjax.config.schema import RunConfig, SourceConfig
from arcticjax.data import adapters, catalog, stored
from arcticjax.errors import ConfigError, DataError
from arcticjax.models.tokenizer import TextTokenizer


def make_tokenizer(path: Path, words: int = 50) -> TextTokenizer:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(words))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(path))
    return TextTokenizer.from_file(path)


class World:
    """A folder with sources of given sizes, and runs over them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tokenizer = make_tokenizer(folder / "tokenizer.json")

    def file(self, name: str, size: int) -> Path:
        path = self.folder / f"{name}.jsonl"
        rng = np.random.default_rng(sum(map(ord, name)))
        with path.open("w") as file:
            for number in range(size):
                document = " ".join(f"w{word}" for word in rng.integers(0, 50, 1 + number % 7))
                record = {"query": f"w{number % 50} {name}", "document": document}
                file.write(json.dumps(record) + "\n")
        return path

    def config(self, sizes, *, batch=8, run="run", weights=None, **data) -> RunConfig:
        sources = [{"name": name, "path": str(self.folder / f"{name}.jsonl")} for name in sizes]
        for name, size in sizes.items():
            if not (self.folder / f"{name}.jsonl").exists():
                self.file(name, size)
        for entry, weight in zip(sources, weights or [], strict=False):
            entry["weight"] = weight
        return RunConfig.model_validate(
            {
                "run": {"directory": str(self.folder / run)},
                "model": {"init": "x"},
                "data": {"sources": sources, **data},
                "optimizer": {"learning_rate": 1e-3},
                "train": {"global_batch": batch},
            }
        )

    def open(self, sizes, **options) -> catalog.Catalog:
        return catalog.open_sources(self.config(sizes, **options), self.tokenizer)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def names(opened):
    return [(view.name, len(view)) for view in opened.views]


def test_sources_in_order(world):
    opened = world.open({"b": 20, "a": 8})
    assert names(opened) == [("b", 20), ("a", 8)]
    assert opened.task_folder is None
    assert [view.weight for view in opened.views] == [None, None]
    folders = sorted((world.folder / "run" / "cache" / "sources").iterdir())
    assert [folder.name.split("-")[0] for folder in folders] == ["a", "b"]
    assert opened.views[0].parts[0].manifest["origin"]["path"] == str(world.folder / "b.jsonl")


def test_a_source_is_tokenised_once(world, monkeypatch):
    first = world.open({"a": 20})

    def never(*_):
        raise AssertionError("read again")
        yield

    monkeypatch.setattr(adapters, "read_pairs", never)
    assert world.open({"a": 20}).fingerprint == first.fingerprint
    with pytest.raises(AssertionError):
        world.open({"a": 20}, cache=str(world.folder / "elsewhere"))


def test_records_that_are_left_out_are_told_of_whenever_it_is_opened(world):
    path = world.file("a", 200)
    with path.open("a") as file:
        file.write('{"query": "w1", "document":\n')
    with pytest.raises(DataError, match=r"'a', .*line 201: not valid JSON"):
        world.open({"a": 200})
    config = world.config({"a": 200})
    [source] = config.data.sources
    skipping = source.model_copy(update={"bad_records": "skip"})
    data = config.data.model_copy(update={"sources": [skipping]})
    for _ in range(2):
        found = catalog.open_sources(config.model_copy(update={"data": data}), world.tokenizer)
        assert names(found) == [("a", 200)]
        assert found.notes == ["a: 1 records that are no pair of texts"]


def test_a_changed_file_or_tokenizer_is_tokenised_again(world):
    first = world.open({"a": 20})
    world.file("a", 21)
    assert names(world.open({"a": 21})) == [("a", 21)]
    world.file("a", 20)
    assert world.open({"a": 20}).fingerprint == first.fingerprint
    world.tokenizer = make_tokenizer(world.folder / "tokenizer.json", words=49)
    other = world.open({"a": 20})
    assert other.fingerprint != first.fingerprint
    assert other.views[0].parts[0].directory != first.views[0].parts[0].directory


def test_a_file_that_changes_while_read_is_an_error(world, monkeypatch):
    read = adapters.read_pairs

    def growing(source, records):
        yield from read(source, records)
        with Path(source.path).open("a") as file:
            file.write('{"query": "w1", "document": "w2"}\n')

    monkeypatch.setattr(adapters, "read_pairs", growing)
    with pytest.raises(DataError, match=r"'a', .*changed while it was read"):
        world.open({"a": 20})
    assert list((world.folder / "run" / "cache" / "sources").iterdir()) == []


def test_a_torn_cache_names_the_file(world):
    directory = world.open({"a": 20}).views[0].parts[0].directory
    os.truncate(directory / "query_ids.npy", 100)
    with pytest.raises(DataError, match=r"query_ids\.npy: has 100 bytes"):
        world.open({"a": 20})


def test_a_stored_source_is_opened_as_it_is(world):
    pairs = [("w1", "w2")] * 10
    path = world.folder / "prepared"
    stored.write_source(path, "inner", iter(pairs), world.tokenizer, origin={})
    source = SourceConfig(name="outer", path=str(path))
    found = catalog.open_cached(source, world.folder / "cache", world.tokenizer)
    assert (found.directory, len(found)) == (path, 10)
    assert not (world.folder / "cache").exists()
    other = make_tokenizer(world.folder / "other.json", words=49)
    with pytest.raises(DataError, match=r"'outer', .*tokenised with another tokenizer"):
        catalog.open_cached(source, world.folder / "cache", other)


def test_only_a_manifest_of_ours_makes_a_stored_source(world):
    folder = world.folder / "foreign"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"format": "another"}')
    source = SourceConfig(name="a", path=str(folder))
    with pytest.raises(DataError, match=r"manifest\.json: is not the manifest of a stored source"):
        catalog.open_cached(source, world.folder / "cache", world.tokenizer)
    world.file("a", 10).rename(folder / "a.jsonl")
    for manifest in ('{"format": "another"}', "[1", "[]"):
        (folder / "manifest.json").write_text(manifest)
        assert len(catalog.open_cached(source, world.folder / "cache", world.tokenizer)) == 10


def test_paths_in_the_home_folder(world, monkeypatch):
    monkeypatch.setenv("HOME", str(world.folder))
    monkeypatch.chdir(world.folder)
    (world.folder / "tokenizer").mkdir()
    (world.folder / "tokenizer.json").rename(world.folder / "tokenizer" / "tokenizer.json")
    world.tokenizer = TextTokenizer.from_file("~/tokenizer")
    config = world.config({"a": 20})
    for run, data in (("~/run", {}), ("elsewhere", {"cache": "~/run/cache"})):
        changed = config.model_copy(
            update={
                "run": config.run.model_copy(update={"directory": run}),
                "data": config.data.model_copy(update=data),
            }
        )
        (view,) = catalog.open_sources(changed, world.tokenizer).views
        assert view.parts[0].directory.parent == world.folder / "run" / "cache" / "sources"
    assert not (world.folder / "~").exists()


def test_views_of_several_sources_read_as_one(world):
    sizes = {"a": 9, "b": 4, "c": 30}
    apart = [view.parts[0] for view in world.open(sizes, batch=4).views]
    (together,) = world.open(sizes, stratified=False, batch=40).views
    assert (together.name, len(together), together.weight) == ("all", 43, None)
    records = np.random.default_rng(0).integers(0, 43, 200)
    where = [(part, record) for part in apart for record in range(len(part))]
    queries, documents = together.read(records)
    for place, record in enumerate(records):
        part, own = where[record]
        query, document = part.read(np.array([own]))
        np.testing.assert_array_equal(queries[place], query[0])
        np.testing.assert_array_equal(documents[place], document[0])
    for sidecar in stored.SIDECARS:
        expected = [getattr(part, sidecar)[own] for part, own in (where[r] for r in records)]
        found = getattr(together, sidecar)(records)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == stored.SIDECARS[sidecar]
    for record in (-1, 43):
        with pytest.raises(IndexError, match=r"'all' has records 0\.\.42"):
            together.document_ids(np.array([record]))
    assert together.read(np.array([], int)) == ([], [])


def test_small_sources_are_an_error_that_says_what_to_do(world):
    with pytest.raises(ConfigError) as caught:
        world.open({"a": 20, "b": 7, "c": 3})
    message = str(caught.value)
    for words in (
        "data.small_sources: 2 of 3 sources",
        "train.global_batch = 8",
        "b (7 pairs), c (3 pairs)",
        "merge",
        "drop",
        "lower train.global_batch to 3",
    ):
        assert words in message
    assert "a (20" not in message
    assert names(world.open({"a": 20, "b": 7, "c": 3}, batch=3)) == [("a", 20), ("b", 7), ("c", 3)]


def test_small_sources_merged(world):
    sizes = {"a": 20, "b": 7, "d": 30, "c": 3}
    opened = world.open(sizes, small_sources="merge")
    assert names(opened) == [("a", 20), ("d", 30), ("merged", 10)]
    assert [part.name for part in opened.views[2].parts] == ["b", "c"]
    opened = world.open(sizes, small_sources="merge", weights=[1.0, 0.5, 2.0, 0.25])
    assert [view.weight for view in opened.views] == [1.0, 2.0, 0.75]
    with pytest.raises(ConfigError, match=r"together hold 10 pairs, fewer .* = 11: .*b \(7 pairs"):
        world.open(sizes, small_sources="merge", batch=11)
    with pytest.raises(ConfigError, match="'merged' is needed"):
        world.open({"merged": 20, "b": 7, "c": 3}, small_sources="merge")


def test_small_sources_dropped(world, caplog):
    with caplog.at_level(logging.WARNING):
        opened = world.open({"a": 20, "b": 7}, small_sources="drop")
    assert names(opened) == [("a", 20)]
    assert "dropped 1 sources" in caplog.text
    assert "b (7 pairs)" in caplog.text
    with pytest.raises(ConfigError, match="drop leaves no source"):
        world.open({"a": 20, "b": 7}, small_sources="drop", batch=21)


def test_mixed_batches_need_enough_pairs_in_all(world):
    assert names(world.open({"a": 20, "b": 7}, stratified=False, batch=27)) == [("all", 27)]
    with pytest.raises(ConfigError, match=r"together hold 27 pairs, fewer than .* = 28"):
        world.open({"a": 20, "b": 7}, stratified=False, batch=28)


def test_weights(world):
    opened = world.open({"a": 20, "b": 9}, weights=[0.5, 2.0])
    assert [view.weight for view in opened.views] == [0.5, 2.0]


def test_fingerprint(world):
    sizes = {"a": 20, "b": 9}
    prints = [
        world.open(sizes).fingerprint,
        world.open({"b": 9, "a": 20}).fingerprint,
        world.open({"a": 20}).fingerprint,
        world.open(sizes, weights=[1.0, 2.0]).fingerprint,
        world.open(sizes, weights=[1.0, 3.0]).fingerprint,
        world.open(sizes, stratified=False).fingerprint,
    ]
    # Dropping b leaves exactly what a alone gives.
    assert world.open(sizes, small_sources="drop", batch=10).fingerprint == prints[2]
    assert len(set(prints)) == len(prints)
    assert world.open(sizes, run="another").fingerprint == prints[0]
    (world.folder / "a.jsonl").rename(world.folder / "b2.jsonl")
    assert world.open({"b2": 20, "b": 9}).fingerprint not in prints


def test_docstrings_sources_follow_the_plain_ones(world, monkeypatch):
    asked = []
    task = world.folder / "task"

    def extract(settings, cache, minimum):
        asked.append((settings.max_pairs, cache, minimum))
        source = SourceConfig(name="numpy", path=str(world.file("numpy", 12)))
        return types.SimpleNamespace(sources=[source], task_folder=task)

    module = types.ModuleType("arcticjax.data.docstrings")
    module.extract = extract
    monkeypatch.setitem(sys.modules, "arcticjax.data.docstrings", module)
    import arcticjax.data

    monkeypatch.setattr(arcticjax.data, "docstrings", module, raising=False)
    opened = world.open({"a": 20}, docstrings={"max_pairs": 77})
    assert names(opened) == [("a", 20), ("numpy", 12)]
    assert opened.task_folder == task
    assert asked == [(77, world.folder / "run" / "cache" / "docstrings", 8)]
    with pytest.raises(ConfigError, match="numpy is also the name of a docstrings source"):
        world.open({"numpy": 12}, docstrings={})


def test_processes_may_build_the_same_cache_at_once(world, tmp_path):
    config = world.config({"a": 400, "b": 300})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    code = (
        "import sys, pathlib\n"
        "from arcticjax.config.schema import RunConfig\n"
        "from arcticjax.data.catalog import open_sources\n"
        "from arcticjax.models.tokenizer import TextTokenizer\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "config = RunConfig.model_validate_json((folder / 'config.json').read_text())\n"
        "tokenizer = TextTokenizer.from_file(folder / 'tokenizer.json')\n"
        "sys.stdout.write('ready\\n'); sys.stdout.flush(); sys.stdin.readline()\n"
        "print(open_sources(config, tokenizer).fingerprint)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    found = {process.communicate(timeout=120)[0] for process in processes}
    assert found == {catalog.open_sources(config, world.tokenizer).fingerprint + "\n"}
    assert len(list((world.folder / "run" / "cache" / "sources").iterdir())) == 2
