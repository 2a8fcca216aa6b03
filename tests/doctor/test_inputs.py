"""What the doctor sees of a config's data before the run reads it."""

import pytest
import yaml

from arcticjax.config import load_config
from arcticjax.doctor import inputs
from arcticjax.errors import DataError
from arcticjax.models.tokenizer import TextTokenizer
from tests import tiny
from tests.data import candidate_files


@pytest.fixture
def look(tmp_path):
    """The fields of a fine-tuning run's only source -> what is said of it."""
    tokenizer = TextTokenizer.from_file(tiny.tokenizer_folder(tmp_path / "tokenizer"))

    def one(count=1, **source):
        config = {
            "run": {"directory": str(tmp_path / "run")},
            "model": {"init": "some/model"},
            "data": {"sources": [{"name": "a", **source}], "negatives": {"count": count}},
            "optimizer": {"learning_rate": 1e-5},
            "train": {"total_steps": 1, "global_batch": 8},
        }
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        return inputs.data(load_config(file), tokenizer)

    return one


def test_columns_of_hard_negatives(tmp_path, look):
    file = candidate_files.jsonl(tmp_path / "a.jsonl", candidate_files.records(0, 20))
    columns = {"path": str(file), "document": "pos", "negatives": ["neg"]}
    assert look(**columns, scores=["pos_scores", "neg_scores"]) == "a 1 file(s)"
    with pytest.raises(DataError, match="no column 'neg_score' for the scores"):
        look(**columns, scores=["pos_scores", "neg_score"])


def test_published_folders(tmp_path, look):
    folder = tiny.task_folder(tmp_path / "task")
    assert look(count=0, path=f"beir:{folder}?split=train") == "a 3 file(s)"
    with pytest.raises(DataError, match=r"task2: no such folder"):
        look(count=0, path=f"beir:{folder}2")


def test_candidates_must_be_mined(tmp_path, look):
    file = str(tiny.parquet(tmp_path / "a.parquet", 0, 20))
    folder = candidate_files.mined(tmp_path / "mined", {"a": tiny.pairs(0, 20)})
    assert look(path=file, candidates=str(folder)) == "a 1 file(s)"
    with pytest.raises(DataError, match=r"c\.jsonl: no such file"):
        look(path=file, candidates=str(folder), corpus=str(tmp_path / "c.jsonl"))
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="holds no finished candidates"):
        look(path=file, candidates=str(folder))
