"""`python -m arcticjax.evaluate`: what it writes, how it goes on, and what it refuses."""

import dataclasses
import json
import signal

import pytest
from huggingface_hub import ModelCard

from arcticjax.errors import ConfigError, DataError, Preempted, ResourceError
from arcticjax.evaluate import __main__ as command
from arcticjax.evaluate import tasks
from arcticjax.export import readers
from arcticjax.export.folder import write_folder
from arcticjax.export.source import open_source
from arcticjax.models.pretrained import load_pretrained
from arcticjax.parallel import mesh as meshes
from arcticjax.scoring import beir
from tests import tiny
from tools.convert_to_torch.__main__ import main as convert_to_torch

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """One device, and the same for every call: programs of equal models and meshes are kept."""
    mesh = meshes.make_mesh(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", lambda *sizes: mesh)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model and two tasks."""
    place = tmp_path_factory.mktemp("evaluate")
    tiny.model_folder(place / "model")
    tiny.task_folder(place / "one", seed=1, count=30)
    tiny.task_folder(place / "two", seed=2, count=20)
    return place


@pytest.fixture
def no_mteb(monkeypatch):
    """As where the extra `eval` is not installed."""
    monkeypatch.setattr(tasks, "has_mteb", lambda: False)


def evaluate(place, *options, names=("one", "two"), output="out"):
    arguments = ["--checkpoint", str(place / "model"), "--output", str(place / output)]
    arguments += ["--tasks", *(f"beir:{place / name}" for name in names), *options]
    assert command.main(arguments) == 0
    return json.loads((place / output / "results.json").read_text())


def test_results_and_report(place, no_mteb, capsys):
    results = evaluate(place, "--compress", "int8", "float32@8")
    assert set(results) == {"one", "two", "model", "revision", "seconds"}
    assert set(results["one"]) == {"ndcg_at_10", "mrr_at_10", "recall_at_100"}
    assert results["model"] == str(place / "model") and len(results["revision"]) == 40
    details = json.loads((place / "out" / "report.json").read_text())
    compressed = details["scores"]["one"]["compressed"]
    assert compressed["float32"] == pytest.approx(results["one"]["ndcg_at_10"], abs=1e-6)
    assert compressed["float32@8"] != compressed["float32"] and 0 < compressed["int8"] < 1
    assert (place / "out" / "report.html").is_file()
    said = capsys.readouterr()
    assert "takes   about 0:00:" in said.err and "2 tasks, 100 texts" in said.err
    assert "nDCG@10" in said.out and "report.html" in said.out


def test_scores_go_into_the_card_of_what_was_scored(place, no_mteb, monkeypatch, tmp_path):
    monkeypatch.setattr(readers, "torch_vectors", lambda folders, probes: None)
    results = evaluate(place, "--compress", "float32@8", output="carded")
    ours = load_pretrained(place / "model")

    def convert(model, file, output="again"):
        options = ["--output", str(tmp_path / output), "--truncate-dim", "8", "--results"]
        return convert_to_torch(["--checkpoint", str(model), *options, str(file)])

    convert(place / "model", place / "carded" / "results.json", "out")
    found = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert f"| one | {results['one']['ndcg_at_10']:.4f} |" in found.text
    details = json.loads((place / "carded" / "report.json").read_text())
    for one in found.data.eval_results:
        cut = details["tasks"][one.dataset_name]["compressed"]["float32@8"]
        assert (one.metric_type, one.metric_value) == ("ndcg_at_10", round(100 * cut, 3))
    assert len(found.data.eval_results) == 2

    # An export of the same weights has the same scores; other weights or prompts have not.
    convert(tmp_path / "out", place / "carded")
    other = tiny.model_folder(tmp_path / "other", seed=5)
    hashes = [open_source(one).sha256 for one in (place / "model", other)]
    with pytest.raises(ConfigError, match=f"another model.* {hashes[0]}, .*other {hashes[1]};"):
        convert(other, place / "carded")
    prompted = write_folder(
        tmp_path / "prompted",
        spec=ours.spec,
        params=ours.params,
        tokenizer_folder=ours.tokenizer_file.parent,
        contract=dataclasses.replace(ours.contract, query_prompt="river "),
    )
    with pytest.raises(ConfigError, match="prompts or pooling are others"):
        convert(prompted, place / "carded")


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_an_evaluation_goes_on_after_its_finished_tasks(place, no_mteb, monkeypatch, capsys, how):
    scored, score = [], tasks.score

    def broken_off(task, *rest):
        if scored and how == "killed":
            raise KeyboardInterrupt
        if scored:
            signal.raise_signal(signal.SIGTERM)
        scored.append(task.name)
        return score(task, *rest)

    monkeypatch.setattr(tasks, "score", broken_off)
    if how == "killed":
        with pytest.raises(KeyboardInterrupt):
            evaluate(place, output=how)
    else:
        with pytest.raises(Preempted, match=r"stopped holds 1 of 2 tasks; the same command"):
            evaluate(place, output=how)
    assert not (place / how / "results.json").exists()
    again = []
    monkeypatch.setattr(
        tasks, "score", lambda task, *rest: again.append(task.name) or score(task, *rest)
    )
    results = evaluate(place, output=how)
    assert (scored, again) == (["one"], ["two"]) and set(results) > {"one", "two"}
    assert "resumes 1 finished: one" in capsys.readouterr().err
    evaluate(place, output=how)
    assert again == ["two"]  # and a third time nothing


@pytest.mark.parametrize("change", ["weights", "data", "length", "compressions", "torn record"])
def test_what_changed_is_scored_again(tmp_path, no_mteb, monkeypatch, change):
    model = tiny.model_folder(tmp_path / "model")
    tiny.task_folder(tmp_path / "one", count=10)
    first = evaluate(tmp_path, names=["one"])
    again, score = [], tasks.score
    monkeypatch.setattr(
        tasks, "score", lambda task, *rest: again.append(task) or score(task, *rest)
    )
    options = []
    if change == "weights":
        tiny.model_folder(model, seed=5)
    elif change == "data":
        with (tmp_path / "one" / "corpus.jsonl").open("a") as file:
            file.write(json.dumps({"_id": "new", "title": "", "text": "river"}) + "\n")
    elif change == "length":
        options = ["--length", "8"]
    elif change == "compressions":
        options = ["--compress", "int4"]
    else:
        (tmp_path / "out" / "tasks" / "one.json").write_text('{"version": 1')
    results = evaluate(tmp_path, *options, names=["one"])
    assert len(again) == 1
    assert (results["revision"] != first["revision"]) == (change in ("weights", "length"))


def test_with_mteb_the_numbers_are_the_same(place, capsys):
    pytest.importorskip("mteb")
    with_mteb = evaluate(place, "--compress", "int8", output="with")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "has_mteb", lambda: False)
        without = evaluate(place, "--compress", "int8", output="without")
    for name in ("one", "two"):
        assert with_mteb[name] == pytest.approx(without[name], abs=1e-5)
    kept, plain = (
        json.loads((place / output / "report.json").read_text())["scores"]
        for output in ("with", "without")
    )
    assert kept["one"]["compressed"] == pytest.approx(plain["one"]["compressed"], abs=1e-6)
    assert kept["one"]["interval"] == pytest.approx(plain["one"]["interval"], abs=1e-6)
    [result] = (place / "with" / "mteb" / "results").rglob("one.json")
    assert result.parent.name == with_mteb["revision"]


def test_a_named_task_of_the_true_layout(place, monkeypatch, capsys):
    """A task by MTEB's name, whose own loader reads a local copy in the hub's layout."""
    pytest.importorskip("mteb")
    from datasets import Dataset
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalDatasetLoader

    local = beir.load_task(place / "one")
    splits = []

    def load(loader, num_proc=None):
        splits.append((loader.hf_repo, loader.split))
        texts = [text.partition(" ") for text in local.documents]
        return {
            "corpus": Dataset.from_dict(
                {
                    "id": local.document_ids,
                    "title": [title for title, _, _ in texts],
                    "text": [text for _, _, text in texts],
                }
            ),
            "queries": Dataset.from_dict({"id": local.query_ids, "text": local.queries}),
            "relevant_docs": local.qrels,
            "top_ranked": None,
        }

    monkeypatch.setattr(RetrievalDatasetLoader, "__init__", _without_hub)
    monkeypatch.setattr(RetrievalDatasetLoader, "load", load)
    arguments = ["--checkpoint", str(place / "model"), "--output", str(place / "named")]
    command.main([*arguments, "--tasks", "mteb:MSMARCO", f"beir:{place / 'one'}", "--length", "32"])
    results = json.loads((place / "named" / "results.json").read_text())
    assert splits == [("mteb/msmarco", "dev")]
    assert results["MSMARCO"] == pytest.approx(results["one"], abs=1e-6)
    assert "Beside published nDCG@10" in (place / "named" / "report.md").read_text()
    details = json.loads((place / "named" / "report.json").read_text())["tasks"]
    revision = details["MSMARCO"]["dataset"].pop("revision")
    assert len(revision) == 40 and details["one"]["dataset"] is None
    assert details["MSMARCO"]["dataset"] == {
        "name": "MTEB MSMARCO",
        "task_type": "Retrieval",
        "main_score": "ndcg_at_10",
        "path": "mteb/msmarco",
        "split": "dev",
        "config": "default",
    }


def _without_hub(loader, hf_repo, revision, trust_remote_code=False, split="test", config=None):
    loader.hf_repo, loader.revision, loader.split, loader.config = hf_repo, revision, split, config


def test_data_that_cannot_be_had_say_what_to_do(place):
    pytest.importorskip("mteb")
    with pytest.raises(DataError, match=r"mteb:NFCorpus: its data cannot be loaded.*beir:FOLDER"):
        output = ["--output", str(place / "offline")]
        command.main(["--checkpoint", str(place / "model"), "--tasks", "mteb:NFCorpus", *output])


@pytest.mark.slow
def test_a_run_by_its_config(tmp_path, no_mteb, capsys):
    """The config names run and tasks; the run's own scores come out again."""
    from arcticjax.train import run as training

    changes = {"train.total_steps": 2, "optimizer.warmup_steps": 1, "data.query_length": 32}
    config = tiny.run_config(tmp_path, **changes, **{"export.enabled": False})
    from arcticjax.config import load_config

    training.run(load_config(config, []))
    assert command.main(["--config", str(config)]) == 0
    results = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())
    trained = json.loads((tmp_path / "run" / "result.json").read_text())["evaluations"]["after"]
    assert results["task"] == pytest.approx(trained["task"], abs=1e-6)
    assert results["model"].endswith("at step 2")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", "NFCorpus"], "expected mteb:NAME"),
        (["--tasks", "mteb:NFCorpus"], r"needs mteb.*arcticjax\[eval\]"),
        (["--tasks", "beir:{0}/one", "beir:{0}/one/"], "called 'one'"),
        (["--tasks", "beir:{0}/model-task/model"], "a name that is taken"),
        (["--tasks", "beir:{0}/one", "--compress", "int8@99"], "have 32 dimensions"),
        (["--tasks", "beir:{0}/one", "--compress", "int3"], "expected float32, int8 or int4"),
        (["--tasks", "beir:{0}/one", "--length", "65"], "positions for 64 tokens"),
        (["--tasks", "beir:{0}/one", "--length", "2"], "expected 3 or more"),
        (["--tasks", "beir:{0}/one", "--step", "3"], "not a run directory"),
        (["--tasks", "beir:{0}/one", "--set", "a=b"], "give --config"),
        ([], "no tasks"),
    ],
)
def test_mistakes_are_refused_before_any_work(place, no_mteb, options, message):
    if not (place / "model-task").exists():
        tiny.task_folder(place / "model-task" / "model", count=2)
    options = [option.format(place) for option in options]
    with pytest.raises(ConfigError, match=message):
        command.main(
            ["--checkpoint", str(place / "model"), "--output", str(place / "none"), *options]
        )
    assert not (place / "none").exists()


def test_other_mistakes(place, no_mteb, monkeypatch):
    with pytest.raises(ConfigError, match="either --config or --checkpoint"):
        command.main(["--tasks", "beir:x"])
    with pytest.raises(ConfigError, match=r"--output: .*no run directory"):
        command.main(["--checkpoint", str(place / "model"), "--tasks", "beir:x"])
    with pytest.raises(DataError, match="is not a folder"):
        evaluate(place, names=["absent"], output="none")
    (place / "file").touch()
    monkeypatch.setattr(tasks, "score", None)  # told before any work
    with pytest.raises(ResourceError, match=r"below.*: cannot be written: Not a directory"):
        evaluate(place, output="file/below")
