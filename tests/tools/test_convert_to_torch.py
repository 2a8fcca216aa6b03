"""The command: a run's checkpoint or a model folder becomes a certified sentence-transformers
folder."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

import arcticjax
from arcticjax.checkpoint.store import CheckpointStore
from arcticjax.config import load_config
from arcticjax.config.contract import TextContract
from arcticjax.errors import CheckpointError, ConfigError
from arcticjax.export import certificate, readers
from arcticjax.export.folder import write_folder
from arcticjax.models.hf_mapping import to_hf_state, to_original_config
from arcticjax.models.pretrained import load_pretrained
from arcticjax.models.resolve import resolve
from arcticjax.models.spec import ModelSpec, parameter_shapes
from tests import tiny
from tests.models.family_specs import SPECS
from tests.torch_here import torch_here
from tools.convert_to_torch.__main__ import main

TOKENIZER = resolve("sentence-transformers/all-MiniLM-L6-v2")
SPEC = ModelSpec(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_positions=64)
CONTRACT = TextContract("query: ", "", 16, 32, "cls")
pytestmark = pytest.mark.usefixtures("quick_compiler")
TORCH_VECTORS = readers.torch_vectors


@pytest.fixture(scope="module", autouse=True)
def fast():
    """Our own reader: sentence-transformers is tried in the certificate's tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "torch_vectors", lambda folders, probes: None)
        yield


def random_params(seed=0):
    generator = np.random.default_rng(seed)
    return unflatten_dict(
        {
            path: generator.normal(scale=0.3, size=shape).astype(np.float32)
            for path, shape in parameter_shapes(SPEC).items()
        },
        sep="/",
    )


def save_run(run, seeds, meta=None):
    """A run directory as arcticjax.train leaves it: a step per seed, 1 onwards."""
    if meta is None:
        meta = {
            "model": {"spec": SPEC.to_hf(), "name": "tiny", "sha256": "0" * 64},
            "contract": CONTRACT.to_dict(),
        }
    with CheckpointStore(run / "checkpoints", keep=len(seeds)) as store:
        for step, seed in enumerate(seeds, 1):
            store.save(step, {"params": jax.device_put(random_params(seed))}, meta)
        store.wait()
    (run / "tokenizer").mkdir(exist_ok=True)
    shutil.copy(TOKENIZER / "tokenizer.json", run / "tokenizer")
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "run", seeds=[11, 12])


def same_weights(folder, params):
    found = flatten_dict(load_pretrained(folder).params, sep="/")
    return all(
        np.array_equal(found[path], value) for path, value in flatten_dict(params, sep="/").items()
    )


def test_a_run_becomes_a_folder(run, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["--checkpoint", str(run), "--output", str(output)]) == 0
    assert same_weights(output, random_params(12))
    assert load_pretrained(output).contract == CONTRACT
    assert json.loads((output / "certificate.json").read_text())["passed"] is True
    said = capsys.readouterr().out
    assert "step 2" in said and "largest difference" in said and "cut to 16 tokens" in said


def test_a_step_can_be_chosen(run, tmp_path):
    main(["--checkpoint", str(run), "--output", str(tmp_path / "out"), "--step", "1"])
    assert same_weights(tmp_path / "out", random_params(11))
    with pytest.raises(CheckpointError):
        main(["--checkpoint", str(run), "--output", str(tmp_path / "no"), "--step", "7"])
    assert not (tmp_path / "no").exists()


def test_a_folder_becomes_a_folder(tmp_path):
    source = write_folder(
        tmp_path / "source",
        spec=SPEC,
        params=random_params(),
        tokenizer_folder=TOKENIZER,
        contract=CONTRACT,
    )
    main(["--checkpoint", str(source), "--output", str(tmp_path / "out")])
    for name in ("model.safetensors", "tokenizer.json", "arcticjax.json", "modules.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    with pytest.raises(ConfigError, match="step: "):
        main(["--checkpoint", str(source), "--output", str(tmp_path / "x"), "--step", "1"])
    with pytest.raises(ConfigError, match="the checkpoint itself"):
        main(["--checkpoint", str(source), "--output", str(source)])


def test_a_plain_folder_needs_the_pooling(tmp_path):
    source = write_folder(
        tmp_path / "source",
        spec=SPEC,
        params=random_params(),
        tokenizer_folder=TOKENIZER,
        contract=CONTRACT,
    )
    (source / "modules.json").unlink()
    command = ["--checkpoint", str(source), "--output", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="pooling"):
        main(command)
    main([*command, "--pooling", "mean"])
    assert load_pretrained(tmp_path / "out").contract.pooling == "mean"


def test_foreign_outputs_and_checkpoints_are_refused(run, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one").touch()
    with pytest.raises(ConfigError, match="not an earlier export"):
        main(["--checkpoint", str(run), "--output", str(tmp_path / "letters")])
    with pytest.raises(ConfigError, match="states its pooling"):
        main(["--checkpoint", str(run), "--output", str(tmp_path / "o"), "--pooling", "cls"])
    with pytest.raises(ConfigError, match="no such folder"):
        main(["--checkpoint", str(tmp_path / "none"), "--output", str(tmp_path / "o")])
    other = save_run(tmp_path / "other", seeds=[1], meta={"note": "by someone else"})
    with pytest.raises(CheckpointError, match="does not say its model"):
        main(["--checkpoint", str(other), "--output", str(tmp_path / "o")])
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        main(["--checkpoint", str(empty), "--output", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()


def test_a_tokenizer_swapped_in_the_run_is_refused(tmp_path):
    """Vectors of the run and of the folder would agree with each other."""
    meta = {"model": {"spec": SPEC.to_hf()}, "contract": CONTRACT.to_dict()}
    run = save_run(tmp_path / "run", seeds=[1], meta=meta)
    path = run / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["extra"] = 30522
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="highest token id is 30522"):
        main(["--checkpoint", str(run), "--output", str(tmp_path / "out")])

    meta["model"]["tokenizer_sha256"] = "0" * 64
    run = save_run(tmp_path / "known", seeds=[1], meta=meta)
    with pytest.raises(CheckpointError, match="is not the tokenizer that checkpoint 1"):
        main(["--checkpoint", str(run), "--output", str(tmp_path / "out")])


def test_an_average_of_steps(run, tmp_path, capsys):
    output = tmp_path / "soup"
    command = ["--checkpoint", str(run), "--output", str(output), "--step", "1", "2"]
    with pytest.raises(ConfigError, match="2 checkpoints become one folder only as an average"):
        main(command)
    main([*command, "--average", "uniform"])
    mean = jax.tree.map(lambda a, b: (a + b) / 2, random_params(11), random_params(12))
    found = flatten_dict(load_pretrained(output).params, sep="/")
    for path, value in flatten_dict(mean, sep="/").items():
        np.testing.assert_allclose(found[path], value, atol=1e-6)
    assert "run at step 1" in (output / "README.md").read_text()
    assert str(run) not in (output / "README.md").read_text()
    with pytest.raises(ConfigError, match="3 steps for 2 checkpoints"):
        main(
            [
                "--checkpoint",
                str(run),
                str(run),
                "--output",
                str(output),
                "--step",
                "1",
                "2",
                "1",
                "--average",
                "uniform",
            ]
        )


def test_an_average_of_folders(run, tmp_path):
    for step in ("1", "2"):
        main(["--checkpoint", str(run), "--output", str(tmp_path / step), "--step", step])
    folders = [str(tmp_path / "1"), str(tmp_path / "2")]
    average = ["--average", "slerp", "--fraction", "0"]
    main(["--checkpoint", *folders, "--output", str(tmp_path / "out"), *average])
    table = load_pretrained(tmp_path / "out").params["embeddings"]["token"]
    np.testing.assert_allclose(table, random_params(11)["embeddings"]["token"], atol=1e-7)


def test_bfloat16_cut_and_in_shards(run, tmp_path, capsys, monkeypatch):
    # Random weights suffer more from rounding than trained ones.
    monkeypatch.setattr(certificate, "BFLOAT16_TOLERANCE", 0.1)
    output = tmp_path / "out"
    main(
        [
            "--checkpoint",
            str(run),
            "--output",
            str(output),
            "--dtype",
            "bfloat16",
            "--truncate-dim",
            "8",
            "--shard-size",
            "0.5MB",
            "--licence",
            "mit",
        ]
    )
    assert len(list(output.glob("model-*.safetensors"))) > 1
    stored = json.loads((output / "certificate.json").read_text())
    assert stored["dtype"] == "bfloat16" and stored["dimension"] == 8
    assert "computed in bfloat16" in capsys.readouterr().out
    assert "license: mit" in (output / "README.md").read_text()
    assert arcticjax.load(output).encode(["river"]).shape == (1, 8)


@pytest.mark.parametrize(
    "average", [[], ["--average", "uniform"], ["--average", "uniform", "--step", "1", "2"]]
)
def test_a_fraction_is_of_slerp(average, run, tmp_path):
    command = ["--checkpoint", str(run), "--output", str(tmp_path / "out"), "--fraction", "0.3"]
    with pytest.raises(ConfigError, match=r"--fraction: .* --average slerp"):
        main([*command, *average])


@pytest.mark.parametrize("size", ["5", "0GB", "many", "5 GiB"])
def test_sizes_that_are_none(size, run, tmp_path):
    with pytest.raises(ConfigError, match=r"write one as 5GB or 200MB; see .* --help"):
        main(["--checkpoint", str(run), "--output", str(tmp_path), "--shard-size", size])


def test_the_reverse_takes_one_folder(run, tmp_path):
    source = write_folder(
        tmp_path / "source",
        spec=SPEC,
        params=random_params(),
        tokenizer_folder=TOKENIZER,
        contract=CONTRACT,
    )
    command = ["--reverse", "--checkpoint", str(source), "--output", str(tmp_path / "in")]
    for extra in (
        ["--step", "1"],
        ["--pooling", "mean"],
        ["--average", "uniform"],
        ["--dtype", "bfloat16"],
        ["--truncate-dim", "4"],
        ["--results", "scores"],
        ["--licence", "mit"],
        ["--fraction", "0.3"],
    ):
        with pytest.raises(ConfigError, match=rf"{extra[0]}: has no meaning with --reverse"):
            main([*command, *extra])
    with pytest.raises(ConfigError, match=r"is a run, .* without --reverse"):
        main(["--reverse", "--checkpoint", str(run), "--output", str(tmp_path / "in")])
    # Proof needs sentence-transformers, which this module has put out of reach.
    with pytest.raises(CheckpointError, match=r"install arcticjax\[convert\]"):
        main(command)
    (source / "modules.json").unlink()
    with pytest.raises(ConfigError, match="no sentence-transformers folder"):
        main(command)


def test_a_sentence_transformers_folder_becomes_a_start(tmp_path, monkeypatch, capsys):
    """MiniLM as published, and as saved again by the library: what it gives there, it gives here,
    and a run starts from it."""
    monkeypatch.setattr(readers, "torch_vectors", TORCH_VECTORS)
    output = tmp_path / "start"
    name = "sentence-transformers/all-MiniLM-L6-v2"
    with torch_here():
        assert main(["--reverse", "--checkpoint", name, "--output", str(output)]) == 0
    assert "certified by arcticjax" in capsys.readouterr().out
    assert same_weights(output, load_pretrained(name).params)
    stored = json.loads((output / "certificate.json").read_text())
    assert stored["passed"] is True and stored["max_difference"] <= 1e-5
    assert "base_model: " + name in (output / "README.md").read_text()
    config = load_config(tiny.run_config(tmp_path / "run", **{"model.init": str(output)}))
    assert load_pretrained(str(config.model.init)).contract.document_length == 256


def original_folder(folder, family):
    """As published: original names and sizes, with code that must not run, nothing of ours."""
    tokenizer = tiny.tokenizer_folder(folder.parent / "tokenizer")
    spec = SPECS[family]
    params = tiny.weights(spec)
    contract = TextContract("query: ", "", 64, 64, "cls")
    write_folder(folder, spec=spec, params=params, tokenizer_folder=tokenizer, contract=contract)
    (folder / "arcticjax.json").unlink()
    tensors = to_hf_state(spec, params, original=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code = {"auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(to_original_config(spec) | code))
    (folder / "code.py").write_text("raise SystemExit('the code of the folder was run')")
    return params


@pytest.mark.parametrize("family", ["nomic_bert", "gte"])
def test_a_folder_in_original_form_becomes_a_start(family, tmp_path, monkeypatch):
    """Its code is not run: sentence-transformers reads its weights under transformers' names."""
    monkeypatch.setattr(readers, "torch_vectors", TORCH_VECTORS)
    source, output = tmp_path / "published", tmp_path / "start"
    params = original_folder(source, family)
    before = {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    with torch_here():
        assert main(["--reverse", "--checkpoint", str(source), "--output", str(output)]) == 0
    stored = json.loads((output / "certificate.json").read_text())
    assert stored["passed"] is True and stored["max_difference"] <= 1e-5
    assert any("That code was not run" in note for note in stored["notes"])
    assert same_weights(output, params)
    assert {file: file.read_bytes() for file in source.rglob("*") if file.is_file()} == before


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    for option in (
        *("--checkpoint", "--output", "--step", "--pooling", "--reverse", "--average"),
        *("--fraction", "--dtype", "--truncate-dim", "--shard-size", "--licence"),
        "--results",
    ):
        assert option in said
