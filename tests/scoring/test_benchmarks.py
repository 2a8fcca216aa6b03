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


@pytest.mark.parametrize(
    "model, mean",
    [
        ("arctic-embed-m-v1.5, 256 x float32", 0.54234),
        ("arctic-embed-m-v1.5, 256 x int8", 0.54275),
        ("arctic-embed-m-v1.5, 256 x int4", 0.53729),
        ("arctic-embed-m", 0.5490),
    ],
)
def test_published_scores_have_their_published_mean(model, mean):
    scores = published.BY_TASK[model]
    assert set(scores) == set(benchmarks.RETRIEVAL_15)
    assert abs(np.mean(list(scores.values())) - mean) < 6e-5
