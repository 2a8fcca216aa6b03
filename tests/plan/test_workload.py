import dataclasses
from pathlib import Path

import numpy as np
import pytest

from arcticjax import errors
from arcticjax.config import load_config
from arcticjax.data import catalog, layout, pipeline
from arcticjax.data.draw import Draw
from arcticjax.models.spec import PRESETS
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.plan import workload
from arcticjax.step import program
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("workload")


def config(folder, **changes):
    return load_config(tiny.run_config(folder, **changes))


def test_assumed_lengths_have_the_stated_means_before_they_are_cut(folder):
    found = workload.describe(
        config(folder, **{"train.global_batch": 16384, "data.query_length": 32}), (12, 200)
    )
    (view,) = found.views
    every = np.arange(len(view))
    assert view.query_lengths(every).mean() + 2 == pytest.approx(12, rel=0.02)
    assert view.document_lengths(every).mean() + 2 == pytest.approx(200, rel=0.02)
    assert found.total_steps == 8  # the config's own
    assert any("12 (queries) and 200 (documents)" in note for note in found.notes)


def test_the_default_documents_are_those_that_were_measured(folder):
    found = workload.describe(config(folder, **{"train.global_batch": 16384}))
    documents = found.views[0].document_tokens + 2
    assert np.median(documents) == pytest.approx(116, rel=0.03)
    assert np.percentile(documents, 90) == pytest.approx(535, rel=0.06)


@pytest.fixture(scope="module")
def stored(folder):
    """A config whose two sources are in stored form."""
    plain = config(folder)
    tokenizer = TextTokenizer.from_file(Path(plain.model.init or ""))
    paths = [
        str(catalog.open_cached(source, folder / "cache", tokenizer).directory)
        for source in plain.data.sources
    ]
    sources = [{"name": name, "path": path} for name, path in zip("ab", paths, strict=True)]
    return config(folder / "stored", **{"data.sources": sources, "train.total_steps": None})


def test_stored_sources_decide_the_steps_of_a_run(stored):
    found = workload.describe(stored)
    assert [view.name for view in found.views] == ["a", "b"]
    assert found.total_steps == found.draw.steps_per_epoch == 6 + 4


@pytest.mark.parametrize("shared", [False, True])
def test_the_load_is_that_of_a_run(stored, shared):
    """Of every step of an epoch on four devices: what training's own batches hold, also where pairs
    share documents."""
    found = workload.describe(stored)
    if shared:
        draw = Draw([96], 16, 0)
        found = dataclasses.replace(found, views=[tiny.memory_view("shared", 0)], draw=draw)
    shapes = layout.Shapes(4, 4, 32, 1, 16, 32)
    steps = found.draw.steps_per_epoch
    load = workload.expected_load(found, shapes, samples=steps)
    build = pipeline.BatchBuilder(
        found.views, found.draw, shapes, found.sides["query"], found.sides["document"], range(4)
    )
    hosts = [build(step) for step in range(steps)]
    arrays = [one.arrays for one in hosts]
    tokens = [one["lengths"].sum() for one in arrays]
    microbatches = [-(-one.rows // shapes.rows) for one in hosts]
    assert load.tokens == np.mean(tokens)
    assert load.squares == np.mean([(one["lengths"].astype(float) ** 2).sum() for one in arrays])
    assert load.microbatches == np.mean(microbatches)
    fill = [own / (4 * used * 32) for own, used in zip(tokens, microbatches, strict=True)]
    assert load.fill == pytest.approx(np.mean(fill))


def test_steps_that_a_rung_takes_are_counted_as_one_piece(stored):
    found = workload.describe(stored)
    shapes = layout.Shapes(4, 4, 32, 1, 16, 32)
    steps = found.draw.steps_per_epoch
    plain = workload.expected_load(found, shapes, samples=steps)
    assert (plain.rows, plain.at_once) == (1, 0)
    ladder = dataclasses.replace(shapes, ladder=(3, 4))
    load = workload.expected_load(found, ladder, samples=steps)
    assert 0 < load.at_once <= 1 and load.microbatches < plain.microbatches
    assert (load.tokens, load.squares) == (plain.tokens, plain.squares)
    assert load.fill <= plain.fill


def test_given_lengths_go_before_stored_ones(stored):
    assert workload.describe(stored, (9, 20)).views[0].name == "stand-in"


def test_sizes_of_a_folder_and_of_published_models(folder):
    assert workload.describe(config(folder)).spec == tiny.SPEC
    one = workload.describe(config(folder, **{"model.keep_layers": 1})).spec
    assert one.num_layers == 1
    changes = {"model.init": "intfloat/e5-large-unsupervised", "model.pooling": "mean"}
    found = workload.describe(config(folder, **changes))
    assert found.spec.parameter_count() == PRESETS["l"].parameter_count()
    assert found.spec.pooling == "mean"
    assert any("not on this machine" in note for note in found.notes)


def test_sizes_of_a_guide(folder):
    assert workload.describe(config(folder)).guide is None
    hub = {"loss.guide": {"model": "Snowflake/snowflake-arctic-embed-l"}}
    assert workload.describe(config(folder, **hub)).guide == PRESETS["l"]
    here = {"loss.guide": {"model": str(folder / "model")}}
    assert workload.describe(config(folder, **here)).guide == tiny.SPEC


def test_a_prompt_without_a_tokenizer_is_counted(folder):
    changes = {"model.init": "intfloat/e5-large-unsupervised", "model.query_prompt": "find this: "}
    found = workload.describe(config(folder, **changes))
    assert found.sides["query"].overhead == 2 + 3
    assert any("'find this: ' is counted as 3 tokens" in note for note in found.notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.init": "somebody/unknown"}, "sizes are not known.*model.preset"),
        (
            {"model.init": "intfloat/e5-base-unsupervised", "data.document_length": 1024},
            "1024 tokens, but the model takes 512",
        ),
        ({"loss.guide": {"model": "somebody/guide"}}, "loss.guide.model.*sizes are not known"),
    ],
)
def test_what_cannot_be_told_is_explained(folder, changes, words):
    with pytest.raises(errors.ConfigError, match=words):
        workload.describe(config(folder, **changes))


def test_a_batch_that_does_not_divide():
    with pytest.raises(errors.ConfigError, match="such as 512"):
        program.check_global_batch(500, 256)
