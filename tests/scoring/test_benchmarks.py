"""Names of benchmarks, their folding, and the published tables."""

import numpy as np
import pytest

from arcticjax.errors import ConfigError
from arcticjax.scoring import benchmarks, published


def test_the_protocol_has_26_tasks_and_15_scores():
    tasks = benchmarks.expand(["mteb:retrieval-15"])
    assert len(tasks) == 26
    folded = benchmarks.folded({task.removeprefix("mteb:"): n for n, task in enumerate(tasks)})
    assert list(folded) == list(benchmarks.RETRIEVAL_15)
    assert {len(values) for values in folded.values()} == {1, 12}
    assert benchmarks.complete(folded) == {"MTEB retrieval (15)": tuple(benchmarks.RETRIEVAL_15)}
    assert benchmarks.complete(list(folded)[1:]) == {}


def test_forums_stay_apart_unless_all_are_there():
    some = {task: 0.5 for task in benchmarks.CQADUPSTACK[1:]}
    assert list(benchmarks.folded(some)) == list(some)


def test_names_are_expanded_once():
    names = ["nano-beir", "mteb:CQADupstackRetrieval", "beir:here", "mteb:NanoNQRetrieval"]
    assert len(benchmarks.expand(names)) == 13 + 12 + 1


@pytest.mark.parametrize("name", ["NFCorpus", "mteb:", "beir:", "mtep:NFCorpus", ""])
def test_other_names_are_refused(name):
    with pytest.raises(ConfigError, match="expected mteb:NAME"):
        benchmarks.expand([name])


# As the notebook on compression, the models' cards and the README of Arctic-Embed give them; all
# but the first three to two decimals of a percent.
MEANS = {
    "arctic-embed-m-v1.5, 256 x float32": 0.54234,
    "arctic-embed-m-v1.5, 256 x int8": 0.54275,
    "arctic-embed-m-v1.5, 256 x int4": 0.53729,
    "arctic-embed-xs": 0.5015,
    "arctic-embed-s": 0.5198,
    "arctic-embed-m": 0.5490,
    "arctic-embed-m-long": 0.5483,
    "arctic-embed-l": 0.5598,
    "arctic-embed-m-v1.5": 0.5514,
    "arctic-embed-m-v2.0": 0.5538,
    "all-MiniLM-L6-v2": 0.4195,
    "e5-small-v2": 0.4904,
    "bge-small-en-v1.5": 0.5168,
    "nomic-embed-text-v1.5": 0.5301,
    "bge-base-en-v1.5": 0.5325,
    "e5-large-v2": 0.5056,
    "bge-large-en-v1.5": 0.5429,
    "mxbai-embed-large-v1": 0.5439,
    "UAE-Large-V1": 0.5466,
    "Cohere-embed-english-v3.0": 0.5500,
    "text-embedding-3-large": 0.5544,
}


@pytest.mark.parametrize("model", published.BY_TASK)
def test_published_scores_have_their_published_mean(model):
    scores = published.BY_TASK[model]
    assert set(scores) == set(benchmarks.RETRIEVAL_15)
    mean = np.mean(list(scores.values()))
    if model in MEANS:
        assert abs(mean - MEANS[model]) < 1.2e-4
    if " x " not in model:
        assert abs(mean - published.MEANS[model]) < 6e-5


def test_the_whole_family_is_there():
    family = ("xs", "s", "m", "m-long", "l", "m-v1.5", "m-v2.0", "l-v2.0")
    assert published.BY_TASK.keys() >= {f"arctic-embed-{size}" for size in family}
    assert published.BY_TASK.keys() >= MEANS.keys()
    assert published.SIZES.keys() == published.BY_TASK.keys()
