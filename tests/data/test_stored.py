"""Stored sources: round trip, TFDS, determinism, races, and every way a folder can be damaged."""

import json
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from arcticjax.data import record_files, record_format, stored
from arcticjax.errors import DataError, ResourceError
from arcticjax.models.tokenizer import TextTokenizer

WORDS = [f"w{number}" for number in range(300)]


def make_tokenizer(folder: Path, words=WORDS) -> TextTokenizer:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return TextTokenizer.from_file(path)


class WideTokenizer:
    """Stands for a vocabulary that needs 32 bits: a word is its number."""

    vocab_size = 250_002
    sha256 = "wide"

    def __init__(self):
        self.largest_batch = 0

    def encode(self, texts):
        self.largest_batch = max(self.largest_batch, len(texts))
        return [np.array([int(word) for word in text.split()], np.int32) for text in texts]


def make_pairs(count, seed=0):
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        # Sizes on both sides of 128 and 16,384 bytes, where protobuf lengths grow by a byte.
        document_words = int(rng.choice([1, 5, 40, 62, 63, 64, 65, 70, 300, 9000]))
        pairs.append(
            (
                " ".join(rng.choice(WORDS, rng.integers(1, 80))),
                " ".join(rng.choice(WORDS, document_words)),
            )
        )
    return pairs


@pytest.fixture
def tokenizer(tmp_path):
    return make_tokenizer(tmp_path)


@pytest.fixture
def source(tmp_path, tokenizer):
    return write(tmp_path / "source", make_pairs(60), tokenizer)


def write(directory, pairs, tokenizer, **options):
    options.setdefault("origin", {"path": "x"})
    return stored.write_source(directory, "web", iter(pairs), tokenizer, **options)


def damage(path, change):
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(change(content))


def edit_manifest(source, change):
    path = source.directory / stored.MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
def test_reads_what_was_written(tmp_path, tokenizer, shard_bytes):
    pairs = make_pairs(200)
    source = write(tmp_path / "s", pairs, tokenizer, shard_bytes=shard_bytes)
    assert (len(source.manifest["shards"]) > 5) == (shard_bytes == 20_000)
    assert (len(source), source.name, source.manifest["token_bytes"]) == (200, "web", 2)
    assert source.manifest["prompts"] == "added to batches"
    records = np.random.default_rng(1).integers(0, 200, 500)
    queries, documents = source.read(records)
    expected = [tokenizer.encode(list(side)) for side in zip(*pairs, strict=True)]
    for place, record in enumerate(records):
        np.testing.assert_array_equal(queries[place], expected[0][record])
        np.testing.assert_array_equal(documents[place], expected[1][record])
    np.testing.assert_array_equal(source.query_lengths, [len(ids) for ids in expected[0]])
    np.testing.assert_array_equal(source.document_lengths, [len(ids) for ids in expected[1]])
    assert source.query_lengths.dtype == np.uint32
    assert source.manifest["tokens"]["document"] == source.document_lengths.sum()


def test_ids_tell_texts_apart_and_are_stable(tmp_path, tokenizer):
    source = write(tmp_path / "s", [("w1", "w2"), ("w1", "w3"), ("w3", "w2")], tokenizer)
    assert source.document_ids.dtype == np.uint64
    assert source.query_ids[0] == source.query_ids[1] != source.query_ids[2]
    assert source.document_ids[0] == source.document_ids[2] != source.document_ids[1]
    # An id on disk must mean the same text for ever (`printf snow | b2sum -l 64`, read backwards).
    assert stored.text_id("snow") == 0x2A1FC81074CDA2D6


def test_wide_vocabulary(tmp_path):
    tokenizer = WideTokenizer()
    source = write(tmp_path / "s", [("250001 7", "65536"), ("1", "2 3")], tokenizer)
    assert source.manifest["token_bytes"] == 4
    queries, documents = source.read(np.array([0, 1]))
    assert [ids.tolist() for ids in queries + documents] == [[250001, 7], [1], [65536], [2, 3]]


def test_empty_read_and_records_out_of_range(source):
    assert source.read(np.array([], np.int64)) == ([], [])
    for record in (-1, 60):
        with pytest.raises(IndexError, match=r"0\.\.59"):
            source.read(np.array([0, record]))


@pytest.mark.filterwarnings("ignore:label:DeprecationWarning")  # TFDS and protobuf
def test_tfds_opens_it(tmp_path, tokenizer):
    import tensorflow_datasets as tfds

    source = write(tmp_path / "s", make_pairs(50), tokenizer, shard_bytes=20_000)
    records = tfds.builder_from_directory(source.directory).as_data_source(split="train")
    assert len(records) == 50
    queries, documents = source.read(np.arange(50))
    for number in (0, 7, 49):
        record = records[number]
        assert record["query_tokens"] == queries[number].tobytes()
        assert record["document_tokens"] == documents[number].tobytes()


def test_record_format_agrees_with_protobuf_for_all_sizes():
    sizes = [0, 1, 100, 117, 118, 119, 120, 121, 122, 126, 127, 128, 130, 16380, 16384, 1 << 21]
    query_sizes, document_sizes = np.array([(q, d) for q in sizes for d in sizes]).T
    starts = record_format.places(query_sizes, document_sizes)
    for query_size, document_size, query_start, document_start, size in zip(
        query_sizes, document_sizes, *starts, strict=True
    ):
        query, document = b"q" * query_size, b"d" * document_size
        record = record_format.serialize(query, document)
        assert len(record) == size
        assert record[query_start : query_start + query_size] == query
        assert record[document_start:] == document


def test_same_input_gives_same_bytes(tmp_path, tokenizer):
    folders = [
        write(tmp_path / name, make_pairs(120), tokenizer, shard_bytes=50_000).directory
        for name in ("a", "b")
    ]
    contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]
    assert len(contents[0]) > 7
    assert contents[0] == contents[1]


def test_fingerprint_follows_content_only(tmp_path, tokenizer):
    pairs = make_pairs(30)
    first = write(tmp_path / "a", pairs, tokenizer)
    moved = write(tmp_path / "b", pairs, tokenizer, origin={"path": "y"}, shard_bytes=1000)
    assert moved.fingerprint == first.fingerprint
    (tmp_path / "other").mkdir()
    prints = {
        write(tmp_path / "c", pairs[::-1], tokenizer).fingerprint,
        write(tmp_path / "d", pairs[:-1], tokenizer).fingerprint,
        write(tmp_path / "e", [*pairs[:-1], ("w1", "w2")], tokenizer).fingerprint,
        write(
            tmp_path / "f", pairs, make_tokenizer(tmp_path / "other", [*WORDS, "more"])
        ).fingerprint,
    }
    assert len(prints | {first.fingerprint}) == 5
    # Texts may differ where their tokens do not: the ids are content too.
    one = write(tmp_path / "g", [("w1 w2", "w3")], tokenizer)
    two = write(tmp_path / "h", [("w1  w2", "w3")], tokenizer)
    assert one.fingerprint != two.fingerprint


def test_pickles_by_folder_and_reads_in_threads(source):
    content = pickle.dumps(source)
    assert len(content) < 1000
    again = pickle.loads(content)
    records = np.arange(60)
    expected = [ids.tolist() for ids in source.read(records)[1]]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: again.read(records)[1], range(20)))
    assert all([ids.tolist() for ids in one] == expected for one in found)


def test_streams_in_bounded_batches(tmp_path):
    tokenizer = WideTokenizer()
    ahead = []

    def pairs():
        for number in range(5000):
            ahead.append(number)
            yield str(number), "1 2 3"

    assert len(write(tmp_path / "s", pairs(), tokenizer)) == 5000
    assert tokenizer.largest_batch == 1024
    tokenizer = WideTokenizer()
    write(tmp_path / "t", [("1", "7 " * 400_000)] * 9, tokenizer)
    assert tokenizer.largest_batch == 3


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (("", "w1"), "query is empty"),
        (("w1", " \t\n"), "document is empty"),
        (("w1", None), "document is missing"),
        ((7, "w1"), "query is not text but int"),
        (("w1", "w2 \ud800"), "document is not valid Unicode"),
    ],
)
def test_bad_sides_are_named_by_record(tmp_path, tokenizer, pair, words):
    with pytest.raises(DataError, match=rf"source 'web', record 3: {words}"):
        write(tmp_path / "s", [("w1", "w2"), ("w1", "w2"), pair], tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json"]


def test_text_without_tokens_is_named_by_record(tmp_path):
    class Dropping(WideTokenizer):
        def encode(self, texts):
            return [ids[ids != 0] for ids in super().encode(texts)]

    pairs = [("1", "2")] * 1500 + [("1", "0 0")]
    with pytest.raises(DataError, match="'web': document of record 1501 has no tokens"):
        write(tmp_path / "s", pairs, Dropping())


def test_no_pairs(tmp_path, tokenizer):
    with pytest.raises(DataError, match="'web' holds no pairs"):
        write(tmp_path / "s", [], tokenizer)
    assert not (tmp_path / "s").exists()


def test_id_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="outside its vocabulary"):
        write(tmp_path / "s", [("1", "250002")], WideTokenizer())


def test_a_failed_write_leaves_nothing(tmp_path, tokenizer):
    def pairs():
        yield from [("w1", "w2 w3")] * 1500
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "sources" / "s", pairs(), tokenizer)
    assert list((tmp_path / "sources").iterdir()) == []


def test_the_loser_of_a_race_uses_the_winners_folder(tmp_path, tokenizer):
    pairs = make_pairs(20)
    winners = []

    def slow():
        yield from pairs
        winners.append(write(tmp_path / "s", pairs, tokenizer))
        marker = tmp_path / "s" / "marker"
        marker.touch()

    loser = write(tmp_path / "s", slow(), tokenizer)
    assert loser.fingerprint == winners[0].fingerprint
    assert (tmp_path / "s" / "marker").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "tokenizer.json"]


def test_a_race_with_other_content_is_an_error(tmp_path, tokenizer):
    def slow():
        yield ("w1", "w2")
        write(tmp_path / "s", [("w1", "w3")], tokenizer)

    with pytest.raises(DataError, match="other content for source 'web'"):
        write(tmp_path / "s", slow(), tokenizer)
    assert len(list(tmp_path.iterdir())) == 2


def test_many_writers_at_once(tmp_path, tokenizer):
    barrier = threading.Barrier(4)

    def pairs():
        barrier.wait(timeout=60)
        yield from make_pairs(100)

    def one(_):
        return write(tmp_path / "deep" / "s", pairs(), tokenizer).fingerprint

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(one, range(4)))) == 1
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["s"]


def test_an_existing_source_is_used_only_if_it_is_the_same(tmp_path, tokenizer, source):
    def never():
        raise AssertionError("read again")
        yield

    assert write(source.directory, never(), tokenizer).fingerprint == source.fingerprint
    with pytest.raises(DataError, match="already holds source 'web' of another origin"):
        write(source.directory, never(), tokenizer, origin={"path": "y"})
    (tmp_path / "other").mkdir()
    other = make_tokenizer(tmp_path / "other", WORDS[:-1])
    with pytest.raises(DataError, match="another origin or tokenizer"):
        write(source.directory, never(), other)


def test_abandoned_folders_are_removed(tmp_path, tokenizer):
    prefix = record_files._temporary_prefix(tmp_path / "s")
    old, alive, _fresh, deep = folders = [
        tmp_path / f"{prefix}{process}-x"
        for process in (4_000_001, os.getpid(), 4_000_002, 4_000_003)
    ]
    for folder in folders:
        folder.mkdir()
        (folder / "shard-0").touch()
    (deep / "more").mkdir()
    (deep / "more" / "fresh").touch()
    for folder in (old, alive, deep):
        for path in (folder / "shard-0", folder / "more", folder):
            if path.exists():
                os.utime(path, (1e9, 1e9))
    write(tmp_path / "s", make_pairs(2), tokenizer)
    assert [folder.exists() for folder in folders] == [False, True, True, True]


def test_a_disk_fault_is_a_resource_error(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot write"):
        write(tmp_path / "file" / "s", make_pairs(2), tokenizer)

    class Full:
        def __init__(self, *_):
            pass

        def write(self, _):
            raise RuntimeError("write() failed: No space left on device")

        close = ok = lambda self: None

    monkeypatch.setattr(record_files.array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(ResourceError, match=r"No space left.*data\.cache"):
        write(tmp_path / "s", make_pairs(2), tokenizer)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("pattern", ["*array_record*", "query_ids.npy", "features.json"])
def test_missing_or_torn_files_are_named(source, pattern):
    path = next(source.directory.glob(pattern))
    damage(path, lambda content: content[:-1])
    with pytest.raises(DataError, match=rf"{path.name}: has \d+ bytes, the manifest says"):
        stored.open_source(source.directory)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: missing"):
        stored.open_source(source.directory)


def test_flipped_bytes_are_found(source):
    path = next(source.directory.glob("*array_record*"))
    middle = path.stat().st_size // 2
    damage(
        path,
        lambda c: c[:middle] + bytes(b ^ 0xFF for b in c[middle : middle + 1]) + c[middle + 1 :],
    )
    opened = stored.open_source(source.directory)
    with pytest.raises(DataError, match=f"{path.name}: cannot be read"):
        opened.read(np.arange(60))
    with pytest.raises(DataError, match=f"{path.name}: content does not match its SHA-256"):
        stored.open_source(source.directory, verify=True)


def test_lengths_that_do_not_fit_the_records_are_found(source):
    path = source.directory / "query_lengths.npy"
    damage(path, lambda content: content[:-4] + b"\x01\x02\0\0")
    with pytest.raises(DataError, match="record 59 of source 'web' has not the size"):
        stored.open_source(source.directory).read(np.arange(60))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: manifest.update(version=2), "format version 2 is unknown"),
        (lambda manifest: manifest.update(prompts="stored"), "its prompts are 'stored'"),
        (lambda manifest: manifest.update(format="other"), "not the manifest of a stored source"),
        (lambda manifest: manifest.pop("shards"), "lacks or distorts 'shards'"),
        (lambda manifest: manifest.pop("records_sha256"), "lacks or distorts 'records_sha256'"),
        (lambda manifest: manifest["files"].pop("query_ids.npy"), "lacks or distorts 'query_ids"),
        (lambda manifest: manifest.update(files=[]), "lacks or distorts"),
        (lambda manifest: manifest.update(pairs=61), r"expected uint32\[61\]"),
        (lambda manifest: manifest["shards"][0].update(records=9), "do not add up to 60"),
        (lambda manifest: manifest["shards"][0].update(file="../x"), r"lacks or distorts '\.\./x'"),
        (
            lambda manifest: manifest["files"].update({"../x": {"bytes": 1}}),
            "not a plain file name",
        ),
    ],
)
def test_foreign_manifests(source, change, words):
    edit_manifest(source, change)
    with pytest.raises(DataError, match=words):
        stored.open_source(source.directory)


def test_no_manifest_and_no_json(tmp_path, source):
    with pytest.raises(DataError, match=r"not a stored source: manifest\.json is missing"):
        stored.open_source(tmp_path / "nowhere")
    damage(source.directory / stored.MANIFEST, lambda content: content[: len(content) // 2])
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read"):
        stored.open_source(source.directory)
