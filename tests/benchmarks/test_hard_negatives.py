"""The comparison of negatives: held-out queries stay out, every arm is a valid config, and what is
finished is not done again."""

import argparse
import json
import subprocess
from pathlib import Path

import pytest
import yaml
from pyarrow import parquet

from arcticjax.config import load_config
from arcticjax.scoring.beir import load_task
from benchmarks import hard_negatives, measuring
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


class Stopped(Exception):
    pass


def test_what_is_finished_is_not_done_again(tmp_path, monkeypatch):
    """A stage that dies leaves the table of what was done; the same command goes on with it."""
    calls, dies = [], "arm2"

    def stage(command, check):
        """Writes what the stage writes last."""
        _, _, module, *arguments = command
        calls.append((module.removeprefix("arcticjax."), *arguments))
        if dies and any(dies in one for one in arguments):
            raise Stopped
        if "--sweep" in arguments:
            file, content = tmp_path / "out/mined/report/a-sweep.png", {}
        elif module.endswith("mine"):
            file, content = tmp_path / "out/mined/report/report.md", {}
        elif module.endswith("train"):
            run = yaml.safe_load(Path(arguments[1]).read_text())["run"]["directory"]
            file, content = Path(run) / "result.json", {"seconds": 3}
        else:
            folder = arguments[arguments.index("--output") + 1]
            content = {"a_held_out": {"ndcg_at_10": 0.25}, "task": {"ndcg_at_10": 0.75}}
            file = Path(folder) / "results.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))

    monkeypatch.setattr(subprocess, "run", stage)
    monkeypatch.setattr(measuring, "machine", dict)  # asks git, in a process
    source = tiny.parquet(tmp_path / "a.parquet", 0, 60)
    command = ["--sources", str(source), "--tasks", "beir:data/task", "--output"]
    with pytest.raises(Stopped):
        hard_negatives.main([*command, str(tmp_path / "out")])
    assert [call[0] for call in calls] == ["mine", "mine", *["evaluate", "train"] * 3]
    assert len(json.loads((tmp_path / "out" / "table.json").read_text())["rows"]) == 3

    calls, dies = [], None
    hard_negatives.main([*command, str(tmp_path / "out")])
    assert [call[0] for call in calls] == ["train", "evaluate"] * 3
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["before", *hard_negatives.arms(1)]
    assert rows[-1]["mean"] == 0.5 and rows[-1]["seconds"] == 3
    with pytest.raises(SystemExit, match="begun with other options"):
        hard_negatives.main([*command, str(tmp_path / "out"), "--steps", "7"])
