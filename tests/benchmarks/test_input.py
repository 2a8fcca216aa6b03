"""The benchmark of the input pipeline: what it stores and counts is the real thing."""

import numpy as np
import pytest

from arcticjax.data import layout
from arcticjax.models.resolve import resolve
from arcticjax.models.tokenizer import TextTokenizer
from benchmarks import input as benchmark

PAIRS = [
    ("a river", "the stone lies in the river"),
    ("clouds", "over the hill they go, slowly, " * 4),
    ("how to weave", "take willow, soak it for a day"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return benchmark.store(tmp_path_factory.mktemp("scratch") / "store", PAIRS, 64)


def test_store_repeats_the_real_tokens_under_ids_of_their_own(source):
    assert len(source) == 64
    assert len(set(source.query_ids.tolist()) | set(source.document_ids.tolist())) == 128
    real = TextTokenizer.from_file(resolve(benchmark.MODEL))
    expected = {
        (tuple(real.encode([query])[0]), tuple(real.encode([document])[0]))
        for query, document in PAIRS
    }
    queries, documents = source.read(np.arange(64))
    found = {
        (tuple(query.tolist()), tuple(document.tolist()))
        for query, document in zip(queries, documents, strict=True)
    }
    assert found == expected


def test_row_counts_pairs_slots_and_stages(source):
    build = benchmark.builder(source, 16, 2, (8, 32), 64)
    row = benchmark.measure(build, 2)
    assert (row["batch"], row["devices"], row["shape"]) == (16, 2, "8/32")
    # A query of [CLS] .. [SEP] is cut to 8 tokens, a document to 32; each of the 16 pairs has both.
    filled = []
    for step in range(3):
        host = build(step)
        slots = layout.round_up(host.rows, row["rows"]) * row["row_length"] * 2
        filled.append(np.count_nonzero(host.arrays["tokens"]) / slots)
    assert row["fill"] == pytest.approx(np.mean(filled))
    assert 0.3 < row["fill"] <= 1
    stages = [row[stage] for stage in (*benchmark.STAGES, "assemble")]
    assert sum(stages) == pytest.approx(1) and min(stages) > 0
    assert row["pairs_per_cpu_second"] > 0
