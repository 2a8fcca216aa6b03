"""The report of an evaluation, read for the card: whose it is, and what is refused."""

import json

import numpy as np
import pytest

from arcticjax.config.contract import TextContract
from arcticjax.errors import CheckpointError, ConfigError
from arcticjax.export.card import Dataset
from arcticjax.export.scores import fingerprints, read_evaluation
from arcticjax.export.source import Source
from tests import tiny

NFCORPUS = {
    "name": "MTEB NFCorpus",
    "task_type": "Retrieval",
    "main_score": "ndcg_at_10",
    "path": "mteb/nfcorpus",
    "revision": "ec0fa4f",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return Source(
        spec=tiny.SPEC,
        params={"kernel": np.ones((2, 3), np.float32)},
        contract=TextContract("query: ", "", 16, 32, "cls"),
        tokenizer_folder=tiny.tokenizer_folder(tmp_path_factory.mktemp("scores")),
        origin="runs/mine at step 8",
    )


@pytest.fixture
def report(source):
    """As `arcticjax.evaluate` writes it, of a longer cut."""
    encoder = {**fingerprints(source), "dimension": 32, "precision": "float32"}
    encoder["contract"] |= {"query_length": 64, "document_length": 64}
    score = {"metrics": {"ndcg_at_10": 0.5}, "compressed": {"float32": 0.5}}
    return {
        "encoder": encoder,
        "tasks": {
            "NFCorpus": {**score, "dataset": dict(NFCORPUS)},
            "forum": {**score, "dataset": None},
        },
        "scores": {"NFCorpus": {**score, "interval": [0.4, 0.6]}},
        "means": {"mean": {**score, "interval": None}},
    }


def read(folder, report, source, name="report.json"):
    (folder / "report.json").write_text(json.dumps(report))
    return read_evaluation(folder / name, source)


def test_a_report_is_read_by_folder_or_file(tmp_path, report, source):
    (tmp_path / "results.json").touch()
    found = read(tmp_path, report, source)
    assert found == read(tmp_path, report, source, "results.json")
    assert found == read(tmp_path, report, source, "")
    assert (found.dimension, found.length, found.precision) == (32, 64, "float32")
    assert list(found.tasks) == ["NFCorpus", "forum"] and list(found.rows) == ["NFCorpus", "mean"]
    assert found.rows["NFCorpus"].dataset == Dataset(**NFCORPUS)
    assert found.tasks["forum"].dataset is None and found.rows["mean"].metrics["ndcg_at_10"] == 0.5


def test_what_is_none(tmp_path, report, source):
    with pytest.raises(ConfigError, match=r"there is no .*report\.json; name what python -m"):
        read_evaluation(tmp_path, source)
    del report["encoder"]
    with pytest.raises(ConfigError, match="does not say which weights were scored"):
        read(tmp_path, report, source)


@pytest.mark.parametrize(
    ("field", "message"),
    [("weights_sha256", "its weights have SHA-256 0000"), ("tokenizer_sha256", "its tokenizer")],
)
def test_another_model_is_refused(tmp_path, report, source, field, message):
    report["encoder"][field] = "0" * 64
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, report, source)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("tasks",), None, "lacks or distorts"),
        (("scores", "NFCorpus", "metrics", "ndcg_at_10"), float("nan"), "ndcg_at_10"),
        (("tasks", "NFCorpus", "dataset", "licence"), "mit", "licence"),
        (("encoder", "dimension"), "many", "many"),
    ],
)
def test_a_damaged_report_is_refused(tmp_path, report, source, place, value, message):
    *parents, last = place
    part = report
    for name in parents:
        part = part[name]
    part[last] = value
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, report, source)
