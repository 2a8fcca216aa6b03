"""Every family trains and leaves a folder that sentence-transformers reads alike."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from arcticjax.config import TextContract
from arcticjax.export import certificate, readers
from arcticjax.export.folder import write_folder
from arcticjax.export.source import make_embedder, open_source
from arcticjax.parallel.mesh import local_mesh
from tests import tiny
from tests.models.family_specs import SPECS
from tests.train.running import lines, train

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


def exported(folder, family, tokenizer):
    """A folder of random weights. The tiny tokenizer pads with token 0, and so do these models."""
    spec = SPECS[family]
    if family == "xlm-roberta":
        spec = dataclasses.replace(spec, pad_token_id=0)
    return write_folder(
        folder,
        spec=spec,
        params=tiny.weights(spec),
        tokenizer_folder=tokenizer,
        contract=TextContract("", "", 64, 64, "mean"),
    )


@pytest.mark.slow
def test_folders_give_the_same_vectors_in_sentence_transformers(tmp_path, tokenizer):
    """Also past the positions that NomicBERT was trained on. One process reads all of them: it
    takes longer to start than to embed."""
    folders = [exported(tmp_path / family, family, tokenizer) for family in SPECS]
    contract = TextContract("", "", 64, 64, "mean")
    probes = certificate.probes_for(contract, open_tokenizer(tokenizer))
    assert any("truncated" in probe.name for probe in probes)
    found = readers.torch_vectors(folders, probes)
    assert found is not None
    for folder, vectors in zip(folders, found[1], strict=True):
        own = readers._own_vectors(folder, probes)
        difference = np.abs(own.exact - vectors.exact).max()
        print(f"{folder.name}: largest difference {difference:.2e}")
        assert difference <= 1e-5, folder.name


def open_tokenizer(folder):
    return certificate.TextTokenizer.from_file(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("passes", ["one", "two"])
def test_two_steps_and_a_certified_export(family, passes, tmp_path, tokenizer):
    """On four devices, two of which share each layer's matrices. By default, states, gradients and
    names of every family are compared with transformers' (tests/models/test_families.py)."""
    exported(tmp_path / "model", family, tokenizer)
    tiny.parquet(tmp_path / "a.parquet", 0, 96)
    tiny.parquet(tmp_path / "b.parquet", 1, 64, longest=8)
    changes = {
        "train.total_steps": 2,
        "optimizer.warmup_steps": 0,
        "train.passes": passes,
        "data.document_length": 24,
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "evaluation.tasks": [],
        "report.plots": False,
    }
    train(tiny.run_config(tmp_path, **changes))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path))
    folder = tmp_path / "run" / "export"
    found = json.loads((folder / "certificate.json").read_text())
    assert found["passed"] and found["reader"].startswith("sentence-transformers")
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    before, after = (open_source(one).params for one in (tmp_path / "model", folder))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(jax.tree.leaves(moved))
    assert make_embedder(open_source(tmp_path / "run"), local_mesh()).dimension == 32
