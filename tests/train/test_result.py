"""result.json holds the contract's keys, all or nothing; evaluations become a table."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from arcticjax.errors import CheckpointError, ResourceError
from arcticjax.train.result import (
    Result,
    before_after_table,
    read_evaluations,
    read_result,
    text_table,
    write_result,
)

KEYS = [
    "status",
    "steps",
    "pairs",
    "seconds",
    "seconds_to_first_step",
    "pairs_per_second",
    "tokens_per_second",
    "fill",
    "compiled_shapes",
    "peak_memory_bytes",
    "evaluations",
    "export",
    "nonfinite_steps",
    "loss_spikes",
]


def fields(**changes):
    return {
        "status": "done",
        "steps": 100,
        "pairs": 6400,
        "seconds": 12.5,
        "seconds_to_first_step": 3.25,
        "pairs_per_second": 700.0,
        "tokens_per_second": 8e4,
        "fill": 0.98,
        "compiled_shapes": [{"program": "train_step", "rows": 8}],
        "peak_memory_bytes": 10**9,
        "evaluations": {"before": {"t": {"ndcg_at_10": 0.25}}},
        "export": "RUN/export",
        "nonfinite_steps": 0,
        "loss_spikes": 0,
        **changes,
    }


def test_written_result_has_exactly_the_keys_of_the_contract_and_reads_back(tmp_path):
    path = write_result(tmp_path, **fields())
    assert path == tmp_path / "result.json"
    assert list(json.loads(path.read_text())) == KEYS
    assert json.loads(path.read_text()) == fields()
    assert read_result(tmp_path) == Result(**fields())
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    write_result(tmp_path, Result(**fields(steps=7)))
    assert read_result(tmp_path) == Result(**fields(steps=7))


def test_scalars_paths_step_labels_and_non_finite_numbers_become_json(tmp_path):
    write_result(
        tmp_path,
        **fields(
            steps=np.int64(3),
            fill=np.float32(0.5),
            pairs_per_second=math.inf,
            export=Path("a") / "b",
            compiled_shapes=({"rows": np.int32(4)},),
            evaluations={50: {"t": {"ndcg_at_10": np.float64(0.5), "mrr_at_10": math.nan}}},
        ),
    )
    found = read_result(tmp_path)
    assert (found.steps, found.fill, found.pairs_per_second, found.export) == (3, 0.5, None, "a/b")
    assert found.compiled_shapes == [{"rows": 4}]
    assert found.evaluations == {"50": {"t": {"ndcg_at_10": 0.5, "mrr_at_10": None}}}
    assert "NaN" not in (tmp_path / "result.json").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, r"unknown \['colour'\]"),
        ({"steps": "3"}, "steps: expected int, got '3'"),
        ({"steps": None}, "steps: expected int, got None"),
        ({"steps": True}, "steps: expected int, got True"),
        ({"peak_memory_bytes": 1.5}, "peak_memory_bytes: expected int"),
        ({"evaluations": {"before": 3}}, "evaluations: expected label"),
        ({"evaluations": {"before": {"t": {"x": "high"}}}}, "evaluations: expected label"),
        ({"compiled_shapes": 1}, "compiled_shapes: expected a list of objects"),
    ],
)
def test_wrong_fields_are_refused_and_the_old_file_stays(tmp_path, change, message):
    write_result(tmp_path, **fields())
    with pytest.raises(TypeError, match=message):
        write_result(tmp_path, **fields(**change))
    with pytest.raises(TypeError, match=r"missing \['export'\]"):
        write_result(tmp_path, **{k: v for k, v in fields().items() if k != "export"})
    assert read_result(tmp_path) == Result(**fields())


def test_a_folder_that_cannot_be_written_is_a_resource_error(tmp_path):
    with pytest.raises(ResourceError, match=r"cannot write .*result\.json"):
        write_result(tmp_path / "absent", **fields())


def test_no_result_is_none_and_newer_keys_are_left_out(tmp_path):
    assert read_result(tmp_path) is None
    (tmp_path / "result.json").write_text(json.dumps(fields(later=1)))
    assert read_result(tmp_path) == Result(**fields())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"status": "do', "not readable as JSON"),
        (b"\xff\xfe\x00", "not readable as JSON"),
        (b"", "not readable as JSON"),
        (b"[1, 2]", "expected a JSON object, got list"),
        (b'{"score": 1}', "not a run's result, it lacks status, steps"),
        (json.dumps(fields(pairs="many")).encode(), "pairs: expected int, got 'many'"),
        (json.dumps(fields(evaluations=[])).encode(), "evaluations: expected"),
    ],
)
def test_torn_and_foreign_results_are_checkpoint_errors(tmp_path, content, message):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"result\.json: {message}.*move it away"):
        read_result(tmp_path)


def test_evaluations_are_collected_by_label_and_the_last_of_equals_wins(tmp_path):
    assert read_evaluations(tmp_path) == {}
    lines = [
        {"step": 0, "label": "before", "task": "a", "ndcg_at_10": 0.9},
        {"step": 0, "label": "before", "task": "a", "ndcg_at_10": 0.1, "mrr_at_10": None},
        {"step": 5, "label": 5, "task": "a", "ndcg_at_10": 0.2},
        {"step": 9, "label": "after", "task": "a", "ndcg_at_10": 0.3},
        {"step": 9, "label": "after", "task": "b", "ndcg_at_10": 0.4},
        {"step": 9, "task": "no label"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 10, "label"'
    (tmp_path / "evaluations.jsonl").write_text(text)
    assert read_evaluations(tmp_path) == {
        "before": {"a": {"ndcg_at_10": 0.1, "mrr_at_10": None}},
        "5": {"a": {"ndcg_at_10": 0.2}},
        "after": {"a": {"ndcg_at_10": 0.3}, "b": {"ndcg_at_10": 0.4}},
    }


def test_table_of_before_and_after():
    evaluations = {
        "before": {"docs": {"recall_at_100": 0.9, "ndcg_at_10": 0.25, "other": None}},
        "50": {"docs": {"ndcg_at_10": 0.3}},
        "after": {"docs": {"recall_at_100": 0.8, "ndcg_at_10": 0.5}, "東大寺": {"mrr_at_10": 1}},
    }
    assert before_after_table(evaluations).splitlines() == [
        "task    metric      before   after  difference",
        "------  ----------  ------  ------  ----------",
        "docs    nDCG@10     0.2500  0.5000     +0.2500",
        "docs    recall@100  0.9000  0.8000     -0.1000",
        "docs    other            -       -           -",
        "東大寺  MRR@10           -  1.0000           -",
    ]
    assert before_after_table({"50": {}}) == "no evaluation before or after training"


def test_text_table_aligns_left_and_right():
    assert text_table(("a", "bb"), [("ccc", "1")], left=1) == "a    bb\n---  --\nccc   1"
