"""The comparison of negatives: held-out queries stay out, and every arm is a valid config."""

import argparse

import pytest
import yaml
from pyarrow import parquet

from arcticjax.config import load_config
from arcticjax.scoring.beir import load_task
from benchmarks import hard_negatives
from tests import tiny


@pytest.fixture
def source(tmp_path):
    file = tiny.parquet(tmp_path / "a.parquet", 0, 60)
    return hard_negatives.split(file, 50, 10, 0, tmp_path / "sources")


def test_held_out_queries_are_searched_and_not_trained_on(source):
    trained = parquet.read_table(source["path"]).to_pylist()
    task = load_task(source["task"].removeprefix("beir:"))
    assert len(task.queries) == 10 and len(trained) == 40
    assert not set(task.queries) & {pair["query"] for pair in trained}
    # They are searched among all documents of the source.
    assert {pair["document"] for pair in trained} < set(task.documents)
    assert all(task.qrels[query] for query in task.query_ids)


def test_arms_differ_in_their_negatives_alone(source, tmp_path):
    options = argparse.Namespace(
        output=tmp_path, seed=0, model="m", query_length=32, document_length=128,
        learning_rate=1e-5, steps=20, batch=8, tasks=[],
    )  # fmt: skip
    loaded = {}
    for name, arm in hard_negatives.arms(3).items():
        file = tmp_path / "arm.yaml"
        file.write_text(yaml.safe_dump(hard_negatives.config(options, [source], arm, tmp_path)))
        loaded[name] = load_config(file)
    first, *others = loaded.values()
    assert len(others) == 4
    for config in others:
        assert config.data.negatives is not None and config.data.negatives.count == 3
        data = config.data.model_copy(update={"negatives": first.data.negatives})
        assert config.model_copy(update={"data": data}) == first
