"""The benchmark of training throughput: its headline, and pairs that both sides treat alike."""

import pyarrow.parquet

from benchmarks import texts
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
