"""What is done with a run or a model in a bucket, on machines that have nothing of it."""

import json

import numpy as np
import pytest
from huggingface_hub import ModelCard

import arcticjax
from arcticjax.buckets import Bucket, Found, folder_here
from arcticjax.checkpoint import CheckpointStore
from arcticjax.checkpoint import __main__ as checkpoint
from arcticjax.config import load_config
from arcticjax.data.candidates import open_candidates
from arcticjax.errors import CheckpointError, ConfigError, StoreError
from arcticjax.evaluate import __main__ as evaluate
from arcticjax.evaluate import tasks
from arcticjax.export import readers
from arcticjax.export.record import base_model
from arcticjax.export.source import open_source
from arcticjax.models import bucket_model
from arcticjax.models.pretrained import load_pretrained
from arcticjax.train import run as training
from tests import object_store, tiny
from tests.mine import making
from tests.train.running import same
from tools.convert_to_torch.__main__ import main as convert_to_torch

pytestmark = pytest.mark.usefixtures("quick_compiler")
SHORT = {
    "train.total_steps": 2,
    "optimizer.warmup_steps": 1,
    "checkpoint.save_every_steps": 1,
    "data.query_length": 32,
    "report.plots": False,
    "report.tensorboard": False,
}
TEXTS = ["river stone cloud", "ember violin"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick_compiler):
    """The folder of what a run was made from; its store; its parameters after step 1 and 2, as the
    machine that trained holds them."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch, object_store.at_hand(patch) as store:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(readers, "torch_vectors", lambda folders, probes: None)
        patch.setattr(tasks, "has_mteb", lambda: False)
        address = store.address("b/run")
        held = {}
        save = CheckpointStore.save

        def keeps(self, step, state, *rest):
            held[step] = {k: np.asarray(v) for k, v in _leaves(state["params"]).items()}
            save(self, step, state, *rest)

        with pytest.MonkeyPatch.context() as saving:
            saving.setattr(CheckpointStore, "save", keeps)
            file = tiny.run_config(folder, **{"run.directory": address, **SHORT})
            training.run(load_config(file))
        yield folder, store, held


def _leaves(tree, path=""):
    if not hasattr(tree, "items"):
        return {path: tree}
    return {k: v for name, one in tree.items() for k, v in _leaves(one, f"{path}/{name}").items()}


@pytest.fixture
def store(trained, tmp_path, monkeypatch):
    """The bucket, seen from a machine that has nothing of the run; what a test changes in it is
    taken back."""
    store = trained[1]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = dict(store.objects)
    yield store
    store.objects, store.buckets = before, None
    store.fault = lambda number, method, name: None


def test_load_gives_the_newest_step_or_the_one_asked_for(trained, store):
    address, held = store.address("b/run"), trained[2]
    for step, asked in ((2, None), (1, 1)):
        source = open_source(address, step=asked)
        found = _leaves(source.params)
        assert found.keys() == held[step].keys()
        assert all(np.array_equal(found[name], held[step][name]) for name in found)
        assert source.origin == f"s3://b/run at step {step}"
    assert not all(np.array_equal(held[1][name], held[2][name]) for name in held[1])
    vectors = arcticjax.load(address).encode(TEXTS)
    there = arcticjax.load(store.address("b/run/export")).encode(TEXTS)
    np.testing.assert_allclose(vectors, there, atol=1e-6)


def test_the_commands_leave_the_bucket_as_it_is(trained, store, tmp_path, monkeypatch, capsys):
    """Verification, evaluation, conversion and mining of the same run, which agree."""
    monkeypatch.setattr(tasks, "has_mteb", lambda: False)
    folder, address, before = trained[0], store.address("b/run"), dict(store.objects)
    assert checkpoint.main(["verify", address]) == 0
    assert "s3://b/run/checkpoints: all good; the run would go on from step 2" in (
        capsys.readouterr().out
    )

    out = ["--output", str(tmp_path / "scored"), "--tasks", f"beir:{folder / 'task'}"]
    assert evaluate.main(["--checkpoint", address, *out]) == 0
    results = json.loads((tmp_path / "scored" / "results.json").read_text())
    told = json.loads(store.objects["b/run/result.json"])["evaluations"]["after"]["task"]
    assert results["task"] == pytest.approx(told, abs=1e-6)
    assert results["model"] == "s3://b/run at step 2"

    out = ["--output", str(tmp_path / "folder"), "--results", str(tmp_path / "scored")]
    assert convert_to_torch(["--checkpoint", address, *out]) == 0
    assert "s3://b/run at step 2 -> " in capsys.readouterr().out
    card = ModelCard((tmp_path / "folder" / "README.md").read_text())
    assert "| 96 |" in card.text and f"{told['ndcg_at_10']:.4f}" in card.text  # pairs of a source
    assert same(load_pretrained(tmp_path / "folder").params, open_source(address).params)

    mined = making.mine(folder, str(tmp_path / "mined"), teacher=address, contract={})
    teacher = open_candidates(mined).manifest["teacher"]
    assert teacher["sha256"] == open_source(str(tmp_path / "folder")).sha256
    assert store.objects == before


@pytest.mark.slow
def test_a_run_starts_from_the_export_of_another(store, tmp_path):
    export = store.address("b/run/export")
    changes = {"run.directory": str(tmp_path / "run"), "model.init": export}
    file = tiny.run_config(tmp_path / "next", **SHORT | changes | {"export.enabled": False})
    training.run(load_config(file))
    state = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert state.read_meta(2)["model"]["name"] == export


def test_a_model_is_copied_once_and_again_when_it_changed(store, tmp_path):
    export = store.address("b/run/export")
    first = load_pretrained(export)
    assert same(first.params, open_source(store.address("b/run")).params)
    del store.requests[:]
    again = load_pretrained(export)
    assert again.folder == first.folder == folder_here("s3://b/run/export") / first.folder.name
    assert not [name for method, name in store.requests if method == "GET" and "model." in name]
    other = tiny.model_folder(tmp_path / "other", seed=5)
    weights = (other / "model.safetensors").read_bytes()
    store.write("b/run/export/model.safetensors", weights)
    assert not same(load_pretrained(export).params, first.params)


def test_mistakes(store, tmp_path):
    with pytest.raises(ConfigError, match=r"s3://b/run: .*it is a run; give s3://b/run/export"):
        load_pretrained(store.address("b/run"))
    with pytest.raises(ConfigError, match=r"s3://b/none: no folder of a model"):
        load_pretrained(store.address("b/none"))
    with pytest.raises(CheckpointError, match=r"s3://b/none: no checkpoint has been saved"):
        open_source(store.address("b/none"))
    with pytest.raises(ConfigError, match=r"step: .*export.* is not a run directory"):
        open_source(store.address("b/run/export"), step=1)
    with pytest.raises(ConfigError, match=r"--output: s3://b/run.* say where"):
        evaluate.main(["--checkpoint", store.address("b/run"), "--tasks", "beir:x"])
    target = store.address("b/out")
    with pytest.raises(ConfigError, match=r"--output.*bucket"):
        evaluate.main(["--checkpoint", str(tmp_path), "--tasks", "beir:x", "--output", target])
    with pytest.raises(ConfigError, match=r"--output.*bucket"):
        convert_to_torch(["--checkpoint", store.address("b/run"), "--output", target])
    store.objects["b/run/tokenizer/tokenizer.json"] = store.objects[
        "b/run/tokenizer/tokenizer.json"
    ].replace(b"river", b"lake")
    with pytest.raises(CheckpointError, match="s3://b/run/tokenizer: is not the tokenizer"):
        open_source(store.address("b/run"))
    store.buckets = {"other"}
    for action in (open_source, load_pretrained, lambda one: checkpoint.main(["verify", one])):
        with pytest.raises(StoreError, match=r"s3://b/run.*no such bucket"):
            action(store.address("b/run"))


def test_a_name_that_leads_elsewhere_is_not_followed(store, tmp_path):
    """Neither by the store's client nor, were there another, by the copy."""
    store.objects["b/run/export/../../../../escaped.json"] = b"{}"
    with pytest.raises(StoreError, match="invalid path"):
        load_pretrained(store.address("b/run/export"))
    bucket = Bucket(store.address("b/run/export"), "model")
    one = Found("../escaped.json", 2, 0.0, bucket.look("config.json").version)
    with pytest.raises(ConfigError, match="is no name for a file"):
        bucket_model._copy(bucket, [one], "", tmp_path / "copies" / "model")
    assert not list(tmp_path.rglob("escaped.json"))


def test_the_base_of_a_model_is_what_its_card_says(store):
    store.objects["b/run/export/README.md"] = b"---\nbase_model: owner/model\n---\n"
    assert base_model(store.address("b/run/export")) == "owner/model"


def test_a_model_whose_copy_broke_off_is_copied_again(store):
    export = store.address("b/run/export")
    store.fault = lambda number, method, name: 403 if "model.safetensors" in name else None
    with pytest.raises(StoreError, match="403"):
        load_pretrained(export)
    assert not list(folder_here("s3://b/run/export").glob("model-*"))
    store.fault = lambda number, method, name: None
    load_pretrained(export)


def test_a_model_that_changes_while_it_is_copied_is_no_model(store):
    """Weights replaced, or a file removed, after the copy has begun."""
    export = store.address("b/run/export")
    weights = "b/run/export/model.safetensors"
    whole = store.objects[weights]

    def replace(number, method, name):
        if "model.safetensors" in name:
            store.objects[weights] = whole + b"more"

    def remove(number, method, name):
        if "model.safetensors" in name:
            store.objects.pop(weights, None)

    for fault in (replace, remove):
        store.objects[weights] = whole
        store.fault = fault
        with pytest.raises(StoreError, match="changed while it was copied"):
            load_pretrained(export)
        assert not list(folder_here("s3://b/run/export").glob("model-*"))
