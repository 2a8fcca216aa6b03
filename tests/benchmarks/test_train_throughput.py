"""The benchmark of training throughput: its headline, and pairs that both sides treat alike."""

import threading

import pyarrow.parquet

from arcticjax.export.source import open_source
from arcticjax.models.spec import PRESETS
from arcticjax.models.tokenizer import TextTokenizer
from benchmarks import models, texts
from benchmarks import train_throughput as benchmark


def row(batch, precision, side, pace):
    return {
        "shape": "32/256",
        "batch": batch,
        "precision": precision,
        "side": side,
        "times as fast": pace,
    }


def test_the_headline_is_the_least_gain_over_sentence_transformers():
    rows = [
        row(64, "float32", benchmark.TORCH, 1.0),
        row(64, "float32", benchmark.ARCTICJAX, 2.5),
        row(256, "float32", benchmark.TORCH, 1.0),
        row(256, "float32", benchmark.ARCTICJAX, 2.25),
        # here the others were measured against us
        row(64, "bfloat16", benchmark.ARCTICJAX, 1.0),
        row(64, "bfloat16", benchmark.TORCH, 0.5),
        row(64, "bfloat16", "arcticjax, two passes", 0.25),
    ]
    assert benchmark.ratios(rows) == {"ratio_fp32": 2.25, "ratio_bf16": 2.0}
    assert benchmark.ratios(rows[:1] + rows[-1:]) == {}


def test_neither_query_nor_document_repeats(tmp_path):
    made = [(f"query {n % 5}", f"document {n}") for n in range(9)]
    texts.write(made, tmp_path / "given.parquet")
    file = benchmark.write_pairs(tmp_path / "given.parquet", tmp_path, most=4, dense=False)
    table = pyarrow.parquet.read_table(file)
    assert len(set(table["query"].to_pylist())) == table.num_rows == 4


def test_one_is_timed_at_a_time_once_all_have_prepared(tmp_path):
    turnstiles = [benchmark.Turnstile(tmp_path / "turnstile") for _ in range(2)]
    for turnstile in turnstiles:
        turnstile.prepare()
    inside, leave = [threading.Event() for _ in turnstiles], threading.Event()

    def take_part(number):
        turnstiles[number].enter()
        inside[number].set()
        leave.wait(60)
        turnstiles[number].leave()

    first, second = (threading.Thread(target=take_part, args=(n,), daemon=True) for n in (0, 1))
    first.start()
    assert not inside[0].wait(0.2)  # the other still prepares
    second.start()
    while not any(event.wait(0.01) for event in inside):
        pass
    assert sum(event.wait(0.2) for event in inside) == 1
    leave.set()
    assert all(event.wait(60) for event in inside)
    for number, thread in enumerate((first, second)):
        thread.join()
        turnstiles[number].close()


def test_a_size_gets_a_folder_that_can_be_read(tmp_path):
    folder = models.folder("xs", ["cranes sleep on one leg", "herons do too"] * 5, tmp_path)
    source = open_source(folder)
    assert source.spec == PRESETS["xs"]
    (ids,) = TextTokenizer.from_file(source.tokenizer_folder).encode(["cranes sleep"])
    assert len(ids) == 2
