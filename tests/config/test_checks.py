"""Rules between fields: each broken alone, on a config that is valid without the change."""

import pytest

from arcticjax.config import RunConfig, load_config
from arcticjax.errors import ConfigError

VALID = """\
run: {directory: runs/x}
model: {init: some/model}
data:
  sources:
    - {name: web, path: web.parquet}
    - {name: news, path: news.parquet}
optimizer: {learning_rate: 1e-5}
train: {total_steps: 100, global_batch: 64}
"""

# Each case: overrides, the path reported, a part of the message.
BROKEN = {
    "no start": (["model={}"], "model", "neither init nor preset"),
    "two starts": (["model.preset=m", "model.tokenizer=t"], "model.preset", "both given"),
    "preset alone": (["model={preset: m}"], "model.tokenizer", "has no tokenizer of its own"),
    "no data": (["data.sources=[]"], "data", "nothing to train on"),
    "same name": (["data.sources.1.name=web"], "data.sources.1.name", "name of data.sources.0"),
    "same column": (["data.sources.1.query=document"], "data.sources.1.document", "same column"),
    "some weights": (["data.sources.1.weight=2"], "data.sources.0.weight", "all sources or none"),
    "weights and docstrings": (
        ["data.sources.0.weight=1", "data.sources.1.weight=2", "data.docstrings={}"],
        "data.sources.0.weight",
        "docstring sources have no weight",
    ),
    "weights mixed": (
        ["data.sources.0.weight=1", "data.sources.1.weight=2", "data.stratified=false"],
        "data.sources.0.weight",
        "no effect",
    ),
    "short row": (["data.row_length=255"], "data.row_length", "data.document_length = 256"),
    "shorter row": (
        ["data.row_length=16", "data.document_length=8"],
        "data.row_length",
        "data.query_length = 32",
    ),
    "hard negatives": (
        ["loss.in_batch_negatives=false"],
        "loss.in_batch_negatives",
        "without negatives",
    ),
    "guide of own documents": (
        [
            "loss.guide={model: some/guide}",
            "loss.in_batch_negatives=false",
            "data.negatives={count: 1}",
            "data.sources=[{name: a, path: a.parquet, negatives: [n]}]",
        ],
        "loss.guide",
        "data.negatives.thresholds",
    ),
    "corpus of nothing": (
        [
            "data.negatives={count: 0}",
            "data.sources=[{name: a, path: a.parquet, negatives: [n], corpus: c.parquet}]",
        ],
        "data.sources.0.corpus",
        "add candidates",
    ),
    "parents of nothing": (
        ["data.negatives={count: 0}", "data.sources.0.parents=[page]"],
        "data.sources.0.parents",
        "no effect",
    ),
    "parents of candidates": (
        [
            "data.negatives={count: 1}",
            "data.sources=[{name: a, path: a.parquet, candidates: mined, parents: [page, pages]}]",
        ],
        "data.sources.0.parents",
        "name the document's column",
    ),
    "wsd": (["optimizer.schedule=wsd"], "optimizer.decay_steps", "required by schedule wsd"),
    "not wsd": (["optimizer.decay_steps=5"], "optimizer.decay_steps", "only schedule wsd"),
    "constant ends": (
        ["optimizer.schedule=constant", "optimizer.final_fraction=0.1"],
        "optimizer.final_fraction",
        "ends at its peak",
    ),
    "long warm-up": (["optimizer.warmup_steps=100"], "optimizer.warmup_steps", "never ends"),
    "long decay": (
        ["optimizer.schedule=wsd", "optimizer.decay_steps=91", "optimizer.warmup_steps=10"],
        "optimizer.decay_steps",
        "take 101 steps",
    ),
    "unequal shares": (["mesh.data=7"], "train.global_batch", "the next multiple is 70"),
    "unequal shares of fsdp": (["mesh.fsdp=3"], "train.global_batch", "mesh.fsdp = 3 devices"),
    "unequal shares of both": (["mesh.data=32", "mesh.fsdp=4"], "train.global_batch", "is 128"),
    "size twice": (
        ["loss.matryoshka=[{size: 8}, {size: 4}, {size: 8}]"],
        "loss.matryoshka.2.size",
        "listed twice",
    ),
    "cudnn in float32": (["train.attention=cudnn"], "train.attention", "computes in bfloat16"),
    "packed in float32": (["train.attention=packed"], "train.attention", "computes in bfloat16"),
    "splash in float32": (["train.attention=splash"], "train.attention", "computes in bfloat16"),
    "ladder down": (["train.ladder=[16, 8]"], "train.ladder", "must ascend"),
    "ladder of two passes": (
        ["train.ladder=[8]", "train.passes=two"],
        "train.ladder",
        "remove one of the two",
    ),
    "unequal slices": (["mesh.data=4", "mesh.slices=3"], "mesh.slices", "take a divisor"),
    "task typo": (
        ["data.docstrings={held_out: [a]}", "evaluation.tasks=[docstring]"],
        "evaluation.tasks.0",
        "did you mean docstrings?",
    ),
    "task kind": (["evaluation.tasks=['bier:x']"], "evaluation.tasks.0", "mean beir:x?"),
    "task folder": (["evaluation.tasks=['beir:']"], "evaluation.tasks.0", "mean beir:FOLDER?"),
    "task unknown": (["evaluation.tasks=[zz]"], "evaluation.tasks.0", "expected beir:FOLDER or"),
    "task twice": (["evaluation.tasks=['beir:a', 'beir:a']"], "evaluation.tasks.1", "twice"),
    "task without data": (["evaluation.tasks=[docstrings]"], "evaluation.tasks.0", "needs data."),
    "task without packages": (
        ["evaluation.tasks=[docstrings]", "data.docstrings={}"],
        "evaluation.tasks.0",
        "held_out is empty",
    ),
    "nothing to score": (["evaluation.every_steps=5"], "evaluation.every_steps", "no effect"),
    "nothing to search": (["evaluation.demo_queries=[a]"], "evaluation.demo_queries", "no effect"),
    "all held out": (
        ["data.docstrings={packages: [a], held_out: [a, b]}"],
        "data.docstrings.packages",
        "no package is left",
    ),
}

FINE = {
    "preset": ["model={preset: m, tokenizer: t}"],
    "docstrings": ["data.sources=[]", "data.docstrings={held_out: [a]}",
                   "evaluation.tasks=[docstrings, 'beir:x']"],
    "weights": ["data.sources.0.weight=1", "data.sources.1.weight=2"],
    "row": ["data.row_length=256"],
    "wsd": ["optimizer.schedule=wsd", "optimizer.decay_steps=90", "optimizer.warmup_steps=10"],
    "one step": ["train.total_steps=1"],
    "an epoch": ["train.total_steps=null", "optimizer.warmup_steps=1000"],
    "constant": ["optimizer.schedule=constant"],
    "shares": ["mesh.data=32", "mesh.fsdp=2"],
    "splash": ["train.attention=splash", "train.precision=bfloat16"],
    "slices": ["mesh.data=4", "mesh.slices=2"],
    "slices of all": ["mesh.slices=3"],
    "packages": ["data.docstrings={packages: [a, b], held_out: [b]}"],
}  # fmt: skip


@pytest.fixture
def valid(tmp_path):
    (tmp_path / "c.yaml").write_text(VALID)
    return tmp_path / "c.yaml"


@pytest.mark.parametrize("case", BROKEN)
def test_rule(valid, case):
    overrides, path, part = BROKEN[case]
    with pytest.raises(ConfigError) as caught:
        load_config(valid, overrides)
    message = str(caught.value)
    assert f": {path}: " in message and part in message
    assert "\n" not in message


@pytest.mark.parametrize("case", FINE)
def test_rule_allows(valid, case):
    load_config(valid, FINE[case])


def test_rules_run_beside_wrong_fields(valid):
    with pytest.raises(ConfigError) as caught:
        load_config(valid, ["run.seed=x", "mesh.data=7", "data.sources.1.name=web"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 problems in the config:"
    assert [part in str(lines) for part in ("run.seed", "global_batch", "sources.1.name")] == [
        True
    ] * 3


def test_rules_do_not_judge_wrong_fields(valid):
    with pytest.raises(ConfigError) as caught:
        load_config(valid, ["optimizer.warmup_steps=many", "train.total_steps=0", "model={ini: x}"])
    lines = str(caught.value).splitlines()
    # No guess about warm-up against total steps, none about the absence of model.init.
    assert lines[0] == "3 problems in the config:" and len(lines) == 4


def test_rules_hold_for_configs_made_in_python():
    values = {
        "run": {"directory": "x"},
        "model": {"init": "a"},
        "data": {"docstrings": {}},
        "optimizer": {"learning_rate": 1.0},
        "train": {"global_batch": 4},
    }
    RunConfig.model_validate(values)
    with pytest.raises(ValueError, match=r"train\.global_batch: 4 pairs cannot be shared"):
        RunConfig.model_validate({**values, "mesh": {"data": 3}})
