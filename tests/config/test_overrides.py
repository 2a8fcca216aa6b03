"""Values given on the command line with `--set`."""

import pytest

from arcticjax.config import load_config
from tests.config.writing import MINIMAL, replaced, report


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optimizer.learning_rate=1e-4", ("optimizer", "learning_rate"), 1e-4),
        ("run.seed=7", ("run", "seed"), 7),
        ("export.enabled=no", ("export", "enabled"), False),
        ("model.keep_layers=null", ("model", "keep_layers"), None),
        ("run.directory=runs/a=b", ("run", "directory"), "runs/a=b"),
        ("run.directory=2024", ("run", "directory"), "2024"),
        ("model.query_prompt=query: ", ("model", "query_prompt"), "query: "),
        ('model.query_prompt="query: "', ("model", "query_prompt"), "query: "),
        ("model.query_prompt=", ("model", "query_prompt"), ""),
        ("model.query_prompt=null", ("model", "query_prompt"), None),
        ("mesh.data=4", ("mesh", "data"), 4),
        ("loss={temperature: 0.1}", ("loss", "temperature"), 0.1),
        ("evaluation.tasks=[beir:a, beir:b]", ("evaluation", "tasks"), ["beir:a", "beir:b"]),
        ("data.docstrings.packages=[jax]", ("data", "docstrings", "packages"), ["jax"]),
    ],
)
def test_override(write, override, path, value):
    got = load_config(write(MINIMAL), [override])
    for name in path:
        got = getattr(got, name)
    assert got == value and type(got) is type(value)


def test_override_into_a_list_and_order(write):
    overrides = ["data.sources.0.path=b.jsonl", "run.seed=1", "run.seed=2"]
    config = load_config(write(MINIMAL), overrides)
    assert config.data.sources[0].path == "b.jsonl"
    assert config.run.seed == 2


BAD_OVERRIDE = {
    "oops": "--set oops: expected PATH=VALUE, as in optimizer.learning_rate=1e-4",
    "=3": "--set =3: expected PATH=VALUE, as in optimizer.learning_rate=1e-4",
    "a..b=3": "--set a..b=3: expected PATH=VALUE, as in optimizer.learning_rate=1e-4",
    "a b=3": "--set a b=3: expected PATH=VALUE, as in optimizer.learning_rate=1e-4",
    "optimiser.learning_rate=3": (
        "--set optimiser.learning_rate=3: optimiser.learning_rate: unknown field; did you mean "
        "optimizer.learning_rate?"
    ),
    "learning_rate=3": (
        "--set learning_rate=3: learning_rate: unknown field; did you mean "
        "optimizer.learning_rate?"
    ),
    "run.seed.x=3": (
        "--set run.seed.x=3: run.seed.x: no such field; run.seed has nothing below it"
    ),
    "data.sources.web.path=x": (
        "--set data.sources.web.path=x: data.sources.web.path: no such field; data.sources has "
        "entries by number"
    ),
    "data.sources.1.path=x": (
        "--set data.sources.1.path=x: data.sources.1.path: data.sources has 1 entries to index; "
        "give the whole list: data.sources=[...]"
    ),
    "evaluation.tasks.0=docstrings": (
        "--set evaluation.tasks.0=docstrings: evaluation.tasks.0: evaluation.tasks has 0 entries "
        "to index; give the whole list: evaluation.tasks=[...]"
    ),
    "run.seed=x": "--set run.seed=x: run.seed: expected a whole number >= 0 and < 2147483648, "
    "got 'x'",
    "train.total_steps=": "--set train.total_steps=: train.total_steps: expected a whole number >= "
    "1 or null, got nothing; write null to unset it",
    "run.seed= ": "--set run.seed= : run.seed: expected a whole number >= 0 and < 2147483648, got "
    "nothing",
    "run.seed=[1": "--set run.seed=[1: run.seed: not YAML: expected ',' or ']', but got "
    "'<stream end>' (while parsing a flow sequence)",
    "train={global_batch: 2, global_batch: 4}": (
        "--set train={global_batch: 2, global_batch: 4}: train.global_batch: given twice, first "
        "on line 1; keep one of them"
    ),
    "loss.tile=*x": "--set loss.tile=*x: loss.tile: aliases are not read (*x); write the value "
    "itself",
}  # fmt: skip


@pytest.mark.parametrize("override", BAD_OVERRIDE)
def test_bad_override(write, override):
    assert report(write(MINIMAL), override) == BAD_OVERRIDE[override]


def test_override_below_a_value_in_the_file(write):
    path = write(MINIMAL + "loss: 5\n")
    assert "loss is 5 in the file, not a section" in report(path, "loss.tile=4")


def test_override_repairs_the_file(write):
    path = write(replaced("1e-5", "fast"))
    assert load_config(path, ["optimizer.learning_rate=1"]).optimizer.learning_rate == 1.0


def test_a_replaced_value_is_located_at_its_override(write):
    override = "data.sources=[{name: .., path: x}]"
    message = report(write(MINIMAL), override)
    assert message.startswith(f"--set {override}: data.sources.0.name: expected text")


def test_override_problems_are_reported_beside_a_missing_file(write):
    message = report("gone.yaml", "oops", "run.sed=1")
    assert "gone.yaml: no such file" in message
    assert "--set oops: " in message and "did you mean run.seed?" in message
