"""A run with a guide (`loss.guide`), and guides that cannot serve."""

import dataclasses
import shutil

import pytest

from arcticjax import errors
from tests import tiny
from tests.train.running import BARE, lines, train

pytestmark = pytest.mark.usefixtures("quick_compiler")
QUICK = {
    **BARE,
    "evaluation.tasks": [],
    "train.total_steps": 2,
    "optimizer.warmup_steps": 0,
}


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    """A finished run whose guide takes every document for an answer: its margin covers all
    cosines."""
    folder = tmp_path_factory.mktemp("guided")
    guide = {"model": str(tiny.model_folder(folder / "guide", seed=1)), "margin": -2.0}
    train(tiny.run_config(folder, **{"loss.guide": guide}, **QUICK))
    return folder


def test_what_the_guide_leaves_out_is_no_negative(guided):
    assert [(line["loss"], line["accuracy"]) for line in lines(guided)] == [(0, 1), (0, 1)]


def test_another_guide_is_refused_on_resume(guided):
    (guided / "run" / "result.json").unlink()
    shutil.rmtree(guided / "guide")
    tiny.model_folder(guided / "guide", seed=2)
    with pytest.raises(errors.ConfigError, match=r"the guide changed.*loss.guide.model"):
        train(guided / "config.yaml")


def test_a_guide_with_another_tokenizer_is_refused(tmp_path):
    guide = tiny.model_folder(tmp_path / "guide")
    tiny.tokenizer_folder(guide, extra=1)
    file = tiny.run_config(tmp_path, **{"loss.guide": {"model": str(guide)}}, **QUICK)
    with pytest.raises(errors.ConfigError, match="another tokenizer"):
        train(file)


def test_a_guide_that_takes_shorter_texts_is_refused(tmp_path):
    spec = dataclasses.replace(tiny.SPEC, max_positions=40)
    guide = tiny.model_folder(tmp_path / "guide", spec=spec)
    changes = {"loss.guide": {"model": str(guide)}, "data.document_length": 48}
    with pytest.raises(errors.ConfigError, match=r"takes 40 tokens.*up to 48"):
        train(tiny.run_config(tmp_path, **changes, **QUICK))
