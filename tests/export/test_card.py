"""The model card: metadata that the hub's own library reads back, and nothing that is not known."""

import json
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from arcticjax.config import load_config
from arcticjax.config.contract import TextContract
from arcticjax.errors import CheckpointError
from arcticjax.export.card import (
    Dataset,
    DataSource,
    Evaluation,
    Facts,
    Score,
    Training,
    card,
    hub_id,
)
from arcticjax.export.record import average_facts, base_model, run_facts
from tests import tiny

CONTRACT = TextContract("query: ", "", 16, 32, "mean")
TRAINING = Training(
    steps=8,
    total_steps=8,
    global_batch=16,
    config={"loss": {"temperature": 0.02}},
    sources=(
        DataSource("web", 900, 4000, 90000, 128, "cc-by-4.0", ("en", "de"), "owner/web"),
        DataSource("notes", 50, 100, 2000, 0, None, ("de",)),
    ),
    before={"local": {"ndcg_at_10": 0.25}, "left": {"ndcg_at_10": 0.1}},
    after={"local": {"ndcg_at_10": 0.31234, "mrr_at_10": None}},
)
FACTS = Facts("arctic-test", 8, "owner/base", "apache-2.0", (), TRAINING)
NFCORPUS = Score(
    {"ndcg_at_10": 0.35, "recall_at_100": 0.3},
    {"float32": 0.35, "int8": 0.34, "float32@8": 0.32},
    Dataset("MTEB NFCorpus", "Retrieval", "ndcg_at_10", "mteb/nfcorpus", "ec0fa4f", "test", "base"),
)
STS = Score(
    {"main_score": 0.7},
    dataset=Dataset("MTEB STS12", "STS", "cosine_spearman", "mteb/sts12-sts", "a0d554a", "test"),
)
LOCAL = Score({"ndcg_at_10": 0.4}, {"float32": 0.4, "int8": 0.4, "float32@8": 0.3})
TASKS = {"NFCorpus": NFCORPUS, "STS12": STS, "local": LOCAL}
EVALUATION = Evaluation(
    tiny.SPEC.hidden_size, 48, "bfloat16", TASKS, {**TASKS, "mean": Score({"ndcg_at_10": 0.375})}
)


def written(facts, dimension=tiny.SPEC.hidden_size):
    return card(tiny.SPEC, CONTRACT, dimension, facts)


def test_the_hubs_library_reads_the_metadata_back():
    found = ModelCard(written(FACTS))
    data = found.data
    assert data.language == ["en", "de"] and data.license == "apache-2.0"
    assert data.base_model == "owner/base" and data.datasets == ["owner/web"]
    assert data.library_name == "sentence-transformers"
    assert data.pipeline_tag == "sentence-similarity" and data.model_name == "arctic-test"
    assert data.eval_results == [
        EvalResult(
            task_type="Retrieval",
            dataset_type="local",
            dataset_name="local",
            metric_type="ndcg_at_10",
            metric_value=31.234,
        )
    ]
    assert "| local | 0.2500 | 0.3123 |" in found.text
    assert "| web | 900 | 4,000 | 90,000 | 128 | owner/web | cc-by-4.0 | en, de |" in found.text
    assert "8 steps of 16 pairs, 128 pairs in all" in found.text
    assert "temperature: 0.02" in found.text and "left" not in found.text


def test_an_evaluation_names_mtebs_data():
    """Its scores stand before those of the run on the same task."""
    found = ModelCard(written(replace(FACTS, evaluation=EVALUATION)))
    results = {(one.dataset_name, one.metric_type): one for one in found.data.eval_results}
    assert results["MTEB NFCorpus", "ndcg_at_10"] == EvalResult(
        task_type="Retrieval",
        dataset_type="mteb/nfcorpus",
        dataset_name="MTEB NFCorpus",
        dataset_config="base",
        dataset_split="test",
        dataset_revision="ec0fa4f",
        metric_type="ndcg_at_10",
        metric_value=35.0,
    )
    assert results["MTEB STS12", "cosine_spearman"].task_type == "STS"
    assert results["local", "ndcg_at_10"].metric_value == 40.0
    assert len(results) == len(found.data.eval_results) == 4
    assert "of vectors of 32 numbers. Texts were cut at 48 tokens, and computed in bfloat16" in (
        found.text
    )
    assert "| NFCorpus | 0.3500 | 0.3000 |  | mteb/nfcorpus |" in found.text
    assert "| STS12 |  |  | 0.7000 | mteb/sts12-sts |" in found.text
    assert "| mean | 0.3750 |  |  |  |" in found.text
    assert "| task | float32 | int8 | float32@8 |" in found.text
    assert "| NFCorpus | 0.3500 | 0.3400 | 0.3200 |" in found.text
    assert "| local | 0.2500 | 0.3123 |" in found.text


def test_the_metadata_have_scores_of_the_folders_own_vectors():
    cut = ModelCard(written(replace(FACTS, evaluation=EVALUATION), dimension=8))
    found = {(one.dataset_name, one.metric_type, one.metric_value) for one in cut.data.eval_results}
    assert found == {("MTEB NFCorpus", "ndcg_at_10", 32.0), ("local", "ndcg_at_10", 30.0)}
    assert "this folder gives the first 8" in cut.text
    assert "They are of whole vectors of 32 numbers." in cut.text
    for facts in (replace(FACTS, evaluation=EVALUATION), FACTS):
        assert "model-index" not in written(facts, dimension=16)
    # What was scored as cut is scored as it is.
    scored = replace(FACTS, training=None, evaluation=replace(EVALUATION, dimension=8))
    assert ModelCard(written(scored, dimension=8)).data.eval_results[0].metric_value == 35.0


def test_what_is_not_known_is_left_out():
    found = ModelCard(written(Facts()))
    assert set(found.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    for claim in ("trained with", "## Training", "## Evaluation", "## Weights", "None"):
        assert claim not in found.text


def test_a_licence_that_the_hub_does_not_know_has_its_own_name():
    data = ModelCard(written(Facts(licence="House Licence 2"))).data
    assert data.license == "other" and data.license_name == "House Licence 2"
    assert ModelCard(written(Facts(licence="Apache-2.0"))).data.license == "apache-2.0"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/model", "owner/model"),
        ("owner/model@v1.5", "owner/model"),
        ("model", None),
        ("/data/model", None),
        ("runs/a/export", None),
        (None, None),
    ],
)
def test_hub_names(name, expected):
    assert hub_id(name) == expected


def test_the_base_of_an_earlier_export_is_handed_on(tmp_path):
    folder = tiny.model_folder(tmp_path / "model")
    assert base_model(str(folder)) is None and base_model(None) is None
    (folder / "README.md").write_text(written(FACTS))
    assert base_model(str(folder)) == "owner/base" == base_model("owner/base@v2")
    (folder / "README.md").write_text("---\n{broken\n---\n")
    assert base_model(str(folder)) is None
    # The card of a folder that others wrote may mean anything.
    (folder / "README.md").write_text(written(FACTS))
    (folder / "arcticjax.json").unlink()
    assert base_model(str(folder)) is None


def recorded(folder, **changes):
    """A run directory with the records that the card reads."""
    config = load_config(tiny.run_config(folder, **{"export.licence": "mit", **changes}))
    run = folder / "run"
    (run / "report").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    (run / "report" / "loss_and_ndcg.png").write_bytes(b"picture")
    parts = [
        {"name": "a", "pairs": 96, "tokens": {"query": 5, "document": 7}, "language": ["en"]},
        {"name": "b", "pairs": 64, "tokens": {"query": 2, "document": 3}, "dataset": "owner/b"},
    ]
    views = [
        {"name": part["name"], "records": part["pairs"], "weight": None, "parts": [part]}
        for part in parts
    ]
    lineage = {
        "base_model": "owner/base@main",
        "total_steps": 8,
        "data": {"global_batch": 16, "seed": 3, "views": views},
    }
    (run / "lineage.json").write_text(json.dumps(lineage))
    lines = [
        {"step": 0, "label": "before", "task": "task", "ndcg_at_10": 0.1},
        {"step": 4, "label": 4, "task": "task", "ndcg_at_10": 0.2},
        {"step": 8, "label": "after", "task": "task", "ndcg_at_10": 0.25},
        {"step": 8, "label": "after", "task": "task", "ndcg_at_10": 0.3},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "task": "to'
    (run / "evaluations.jsonl").write_text(text)
    return run


def test_a_run_is_told_as_it_was_recorded(tmp_path):
    run = recorded(tmp_path)
    facts = run_facts(run, 8)
    assert (facts.base_model, facts.licence, facts.name) == ("owner/base", "mit", "run")
    training = facts.training
    assert training is not None
    assert training.before == {"task": {"ndcg_at_10": 0.1}}
    assert training.after == {"task": {"ndcg_at_10": 0.3}}
    assert training.curves == run / "report" / "loss_and_ndcg.png"
    assert sum(source.drawn or 0 for source in training.sources) == 8 * 16
    assert training.sources[0].languages == ("en",) and training.sources[1].dataset == "owner/b"
    assert training.config["train"]["global_batch"] == 16
    # No place on the machine that trained.
    assert str(tmp_path) not in written(facts)


def test_an_earlier_step_has_its_own_scores_and_pairs(tmp_path):
    run = recorded(tmp_path)
    training = run_facts(run, 4).training
    assert training is not None and training.after == {"task": {"ndcg_at_10": 0.2}}
    assert sum(source.drawn or 0 for source in training.sources) == 4 * 16
    assert "4 of 8 steps" in written(run_facts(run, 4))
    unscored = run_facts(run, 5)
    assert "## Evaluation" not in written(unscored)
    assert "model-index" not in written(unscored)


def test_a_run_that_recorded_less_is_told_in_less(tmp_path):
    run = recorded(tmp_path)
    for name in ("lineage.json", "evaluations.jsonl", "report/loss_and_ndcg.png"):
        (run / name).unlink()
    facts = run_facts(run, 8)
    assert facts.base_model is None and facts.training is not None
    assert not facts.training.sources and facts.training.curves is None
    (run / "config.yaml").unlink()
    assert run_facts(run, 8) == Facts(name="run", step=8)


def test_a_damaged_record_is_refused(tmp_path):
    run = recorded(tmp_path)
    lineage = json.loads((run / "lineage.json").read_text())
    del lineage["data"]["views"][0]["records"]
    (run / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(CheckpointError, match=r"lineage\.json: lacks or distorts 'records'"):
        run_facts(run, 8)


def test_an_average_says_what_its_parts_share():
    other = Facts("other", 9, "owner/base", "mit")
    found = average_facts([FACTS, other], "mean")
    assert found.base_model == "owner/base" and found.licence is None
    text = written(found)
    assert "average (mean) of\n\n- arctic-test at step 8\n- other at step 9" in text
    assert "## Training" not in text
