"""What a user can get wrong: one clear message, the documented exit code, and nothing lost."""

import errno
import gzip
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy
from tokenizers import Tokenizer

from arcticjax import errors
from arcticjax.checkpoint.run_directory import RunDirectory
from arcticjax.config import dump_config, load_config
from arcticjax.models.pretrained import load_pretrained
from arcticjax.train import __main__ as command
from tests import tiny
from tests.train import running
from tests.train.running import BARE, UNSCORED

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A complete tiny run, not yet started; each test works on a copy."""
    folder = tmp_path_factory.mktemp("made") / "it"
    tiny.run_config(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "it")
    return tmp_path / "it"


def contents(folder):
    """Every file below a folder, with its bytes."""
    files = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def fails(file, kind, match, *sets):
    """The message; and the run directory has all it had, and beside that only tokenised sources and
    metrics of no step."""
    run = file.with_name("run")
    before = contents(run)
    message = running.fails(file, kind, match, *sets)
    after = contents(run)
    assert {name: after.get(name) for name in before} == before
    new = {name: after[name] for name in after.keys() - before.keys() if "cache/" not in name}
    assert new in ({}, {"metrics.jsonl": b""})
    return message


def test_unknown_key(folder):
    file = tiny.run_config(folder, **{"optimizer.learning_rat": 1e-3})
    message = fails(file, errors.ConfigError, "optimizer.learning_rat")
    assert "learning_rate" in message.replace("learning_rat:", "") and str(file) in message


def test_wrong_type(folder):
    fails(
        tiny.run_config(folder, **{"train.global_batch": "many"}),
        errors.ConfigError,
        "train.global_batch",
    )


def test_impossible_combination(folder):
    fails(
        tiny.run_config(folder, **{"loss.in_batch_negatives": False}),
        errors.ConfigError,
        "in_batch_negatives",
    )


def test_missing_source(folder):
    (folder / "a.parquet").unlink()
    fails(tiny.run_config(folder), errors.DataError, "'a'.*a.parquet")


def test_empty_source(folder):
    (folder / "a.parquet").write_bytes(b"")
    fails(tiny.run_config(folder), errors.DataError, "'a'.*a.parquet")


def test_a_source_of_no_records(folder):
    file = folder / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(file)[:0], file)
    fails(tiny.run_config(folder), errors.DataError, r"source 'a'.*a\.parquet: holds no records")


def test_a_record_with_an_empty_side(folder):
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        for number in range(20):
            file.write(
                json.dumps({"query": f"river {number}", "document": "" if number == 7 else "stone"})
                + "\n"
            )
    sources = [{"name": "c", "path": str(folder / "c.jsonl.gz")}]
    fails(tiny.run_config(folder, **{"data.sources": sources}), errors.DataError, r"'c'.*\b[78]\b")


def test_a_batch_larger_than_a_source(folder):
    message = fails(
        tiny.run_config(folder, **{"train.global_batch": 80}), errors.ConfigError, "'?b'?.*64"
    )
    assert "small_sources" in message


def test_a_batch_that_devices_do_not_divide(folder):
    file = tiny.run_config(folder, **{"mesh.data": 3})
    fails(file, errors.ConfigError, "train.global_batch: 16 pairs .* mesh.data = 3 devices")
    file = tiny.run_config(folder, **{"mesh.data": "auto", "train.global_batch": 12})
    fails(file, errors.ConfigError, "train.global_batch: 12 pairs do not divide among 8 devices")


def test_more_devices_than_there_are(folder):
    fails(
        tiny.run_config(folder, **{"mesh.data": 16}),
        errors.ConfigError,
        "16 devices, but 8 are at hand",
    )


def test_a_tokenizer_that_does_not_match_the_weights(folder):
    """Larger than their table; with other words; and beside the weights, with padding past it."""
    tokens = tiny.tokenizer_folder(folder / "larger", extra=200)
    file = tiny.run_config(folder, **{"model.tokenizer": str(tokens)})
    said = r"does not match the weights: its highest token id is 246, the .*model has 120 rows"
    fails(file, errors.ConfigError, rf"model\.tokenizer: .*larger/tokenizer\.json {said}")

    other = tokens / "tokenizer.json"
    own = (folder / "model" / "tokenizer.json").read_text()
    other.write_text(own.replace('"river"', '"delta"'))
    said = r"does not match the weights: .*model/tokenizer\.json, .*, gives other tokens"
    fails(file, errors.ConfigError, rf"model\.tokenizer: .*larger/tokenizer\.json {said}")

    padding = Tokenizer.from_str(own)
    padding.enable_padding(pad_id=120)
    padding.save(str(folder / "model" / "tokenizer.json"))
    said = r"model/tokenizer\.json: its highest token id is 120, the token table of .* 120 rows"
    fails(tiny.run_config(folder), errors.CheckpointError, said)


def test_weights_without_a_tokenizer_take_the_one_that_is_given(folder):
    tokens = tiny.tokenizer_folder(folder / "tokens")
    file = tiny.run_config(folder, **{"model.tokenizer": str(tokens)}, **UNSCORED)
    (folder / "model" / "tokenizer.json").unlink()
    with pytest.raises(errors.ConfigError, match="no such file; give a folder"):
        load_pretrained(folder / "model")
    found = load_pretrained(folder / "model", tokenizer=load_config(file).model.tokenizer)
    assert found.tokenizer_file == tokens / "tokenizer.json"


def test_weights_of_another_shape(folder):
    file = folder / "model" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = "embeddings.word_embeddings.weight"
    tensors[name] = np.zeros((7, 32), np.float32)
    safetensors.numpy.save_file(tensors, file)
    fails(tiny.run_config(folder), errors.CheckpointError, r"word_embeddings[\s\S]*7")


class Trap:
    def __reduce__(self):
        return (open, ("trap-was-sprung", "w"))


def test_a_pickle_is_refused_and_not_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "model" / "model.safetensors").unlink()
    (folder / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    fails(tiny.run_config(folder), errors.CheckpointError, "pytorch_model.bin.*safetensors")
    assert not (folder / "trap-was-sprung").exists()


def test_a_run_directory_that_is_a_file(folder):
    (folder / "run").write_text("mine")
    fails(tiny.run_config(folder), errors.ConfigError, "run.directory.*not a directory")
    assert (folder / "run").read_text() == "mine"


def test_a_run_directory_that_cannot_be_read(folder, monkeypatch):
    """As another user's; root, who may run this test, can read everything."""
    listed = os.listdir

    def refuse(path="."):
        if os.fspath(path) == str(folder / "run"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", refuse)
    before = sorted(listed(folder))
    fails(tiny.run_config(folder), errors.ResourceError, "run.directory.*Permission denied")
    assert sorted(listed(folder)) == sorted({*before, "run"})


def test_two_runs_in_one_directory(folder):
    file = tiny.run_config(folder)
    with RunDirectory(folder / "run").claim():
        said = rf"run\.directory {folder / 'run'} is in use by process {os.getpid()} on host"
        fails(file, errors.ConfigError, said)


@pytest.mark.parametrize(
    ("free", "what"), [(1000, "the run"), (300_000, "a checkpoint")], ids=["none", "little"]
)
def test_a_disk_without_room(folder, monkeypatch, free, what):
    """A checkpoint of this model takes half a megabyte; no step is compiled before it has room."""
    monkeypatch.setattr("arcticjax.train.run._compile", None)
    monkeypatch.setattr("arcticjax.checkpoint.run_directory._SMALL_FILES", 2000)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, free)
    )
    place = rf"{folder / 'run'}\S* \(run\.directory\)"
    said = rf"no room for {what} on the disk of {place}: [\d,]+ bytes needed, {free:,} bytes free"
    fails(tiny.run_config(folder), errors.ResourceError, said)


def test_resuming_with_another_config_names_the_field(folder):
    file = tiny.run_config(folder, **UNSCORED)
    command.main(["--config", str(file)])
    message = fails(
        file, errors.ConfigError, "optimizer.learning_rate", "optimizer.learning_rate=0.5"
    )
    assert "0.002 in the run, 0.5 now" in message
    # What does not change what is learned may change.
    free = ["train.passes=two", "train.microbatch=2", "loss.tile=8", "data.threads=1"]
    free.append("train.attention=xla")
    command.main(["--config", str(file), *(word for one in free for word in ("--set", one))])


def test_a_run_that_saved_nothing_may_begin_anew_with_another_config(folder):
    """Nothing of it stays in the run's records."""
    file = tiny.run_config(folder, **BARE)
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(load_config(file, ["optimizer.beta1=0.5"])))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 7.0}\n')
    (run / "evaluations.jsonl").write_text(
        '{"step": 0, "label": "before", "task": "old", "ndcg_at_10": 1.0}\n'
    )
    command.main(["--config", str(file), "--set", "train.total_steps=3"])
    assert load_config(run / "config.yaml").optimizer.beta1 == 0.9
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    evaluations = json.loads((run / "result.json").read_text())["evaluations"]
    assert list(evaluations["before"]) == ["task"]


def test_damaged_files_of_a_run_are_named_as_its_own(folder):
    file = tiny.run_config(folder, **{"train.total_steps": 3}, **UNSCORED)
    train = ["--config", str(file)]
    command.main(train)
    config, result = folder / "run" / "config.yaml", folder / "run" / "result.json"
    whole = config.read_text()
    for damaged in ("", whole[: len(whole) // 2]):
        config.write_text(damaged)
        message = fails(file, errors.ConfigError, r"config\.yaml: the run's own copy of its config")
        assert "move the file away" in message
    config.unlink()
    result.write_text('{"status": "do')
    message = fails(file, errors.CheckpointError, r"result\.json: not readable as JSON")
    assert "move it away, and the same command resumes" in message
    result.unlink()
    command.main(train)  # as both messages say
    assert config.read_text() == whole and json.loads(result.read_text())["steps"] == 3


def test_resuming_on_other_data_shows_both_fingerprints(folder):
    file = tiny.run_config(folder, **UNSCORED)
    command.main(["--config", str(file)])
    (folder / "run" / "result.json").unlink()  # as if the run had not ended
    tiny.parquet(folder / "a.parquet", 5, 96)
    message = fails(file, errors.ConfigError, "the data changed")
    before, now = message.split("fingerprint ")[1].split(" in the checkpoint, ")
    assert before != now.split(" now")[0]


@pytest.mark.slow
def test_a_shard_that_is_damaged_under_a_run(folder):
    """Files of the right size with other bytes, as a bad disk leaves them."""
    file = tiny.run_config(folder, **{"data.cache": str(folder / "cache")}, **BARE)
    command.main(["--config", str(file)])
    for shard in (folder / "cache" / "sources").glob("a-*/*array_record*"):
        data = shard.read_bytes()
        shard.write_bytes(data[:1000] + b"\0" * (len(data) - 2000) + data[-1000:])
    again = f"run.directory={folder / 'again'}"
    fails(file, errors.DataError, r"sources/a-.*array_record.*: cannot be read", again)


def test_a_kernel_that_this_machine_cannot_run(folder):
    file = tiny.run_config(folder, **{"train.precision": "bfloat16", "train.attention": "splash"})
    fails(file, errors.ConfigError, "train.attention: splash.*runs on tpu, the devices are cpu")


def test_a_task_that_is_not_there(folder):
    file = tiny.run_config(folder, **{"evaluation.tasks": [f"beir:{folder / 'nowhere'}"]})
    fails(file, errors.DataError, "nowhere")
