"""`arcticjax.load`: one way in for runs, folders and names, and an import that costs nothing."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import arcticjax
from arcticjax.checkpoint.store import CheckpointStore
from arcticjax.errors import CheckpointError, ConfigError
from arcticjax.export.source import open_source
from arcticjax.models.pretrained import load_pretrained
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["river stone", "", "lantern meadow copper thistle falcon", "velvet"]
UNWANTED = ("torch", "transformers", "sentence_transformers", "mteb", "tensorflow")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder):
    """A run whose step 2 holds the folder's weights, and step 1 others."""
    run = tmp_path_factory.mktemp("runs") / "run"
    tiny.tokenizer_folder(run / "tokenizer")
    loaded = load_pretrained(folder)
    meta = {"model": {"spec": loaded.spec.to_hf()}, "contract": loaded.contract.to_dict()}
    with CheckpointStore(run / "checkpoints") as store:
        for step, scale in ((1, 0.5), (2, 1.0)):
            params = jax.tree.map(lambda leaf, by=scale: leaf * np.float32(by), loaded.params)
            store.save(step, {"params": jax.device_put(params)}, meta)
    return run


def test_a_folder_embeds(folder):
    encoder = arcticjax.load(folder)
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), tiny.SPEC.hidden_size) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    # A text's vector does not depend on what it is packed with, nor on its place.
    np.testing.assert_allclose(encoder.encode(TEXTS[::-1]), vectors[::-1], atol=1e-6)
    short = encoder.encode(TEXTS, prompt="query", dimension=8)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-5)
    assert encoder.similarity(short, vectors[:1, :8]).shape == (len(TEXTS), 1)


def test_a_run_gives_its_newest_good_step(run, folder):
    expected = arcticjax.load(folder).encode(TEXTS)
    np.testing.assert_allclose(arcticjax.load(str(run)).encode(TEXTS), expected, atol=1e-6)
    other = arcticjax.load(run, step=1).encode(TEXTS)
    assert np.abs(other - expected).max() > 1e-3


def test_the_python_of_the_readme(run, capsys):
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "runs/mine" in block
    exec(block.replace("runs/mine", str(run)), {})
    assert capsys.readouterr().out.startswith("[[")


def test_a_damaged_step_is_passed_over(run, tmp_path, caplog):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoints" / "2" / "MANIFEST.json").write_text("torn")
    source = open_source(copy)
    assert source.origin.endswith("at step 1") and "damaged" in caplog.text
    with pytest.raises(CheckpointError, match="damaged"):
        open_source(copy, step=2)


def test_a_name_of_a_known_wheel():
    source = open_source("sentence-transformers/all-MiniLM-L6-v2")
    assert (source.spec.num_layers, source.spec.hidden_size) == (6, 384)
    assert source.contract.pooling == "mean"


@pytest.mark.parametrize("name", ["", "no/such/folder", "somewhere"])
def test_a_name_that_is_nothing(name, tmp_path, monkeypatch):
    # An empty name must not mean the folder one happens to stand in.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="no such folder"):
        arcticjax.load(name)


def test_options_that_do_not_apply(run, folder):
    with pytest.raises(ConfigError, match="step: "):
        arcticjax.load(folder, step=1)
    with pytest.raises(ConfigError, match="states its pooling"):
        arcticjax.load(run, pooling="cls")


def test_the_front_import_is_light():
    loaded = _modules_after("import arcticjax; assert arcticjax.__version__")
    assert not {"jax", "numpy", "pydantic", *UNWANTED} & loaded


def test_no_import_starts_a_backend_or_brings_a_heavy_library():
    """Every module but those that are MTEB's classes: an import must neither take a chip nor make a
    command slow to start."""
    loaded = _modules_after(
        """
import importlib, pkgutil, arcticjax
names = [m.name for m in pkgutil.walk_packages(arcticjax.__path__, "arcticjax.")]
assert len(names) > 50, names
for name in names:
    if not name.startswith("arcticjax.scoring.mteb_"):
        importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    )
    assert "jax" in loaded
    assert not set(UNWANTED) & loaded


def _modules_after(code):
    """Top-level modules loaded in a fresh interpreter after `code`."""
    code += "\nimport sys; print(' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())
