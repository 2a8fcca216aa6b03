"""The bootstrap: what it is wide for, and that it repeats."""

import numpy as np

from arcticjax.scoring import bootstrap


def test_interval_of_a_proportion_is_the_known_one(monkeypatch):
    monkeypatch.setattr(bootstrap, "_BLOCK", 3000)  # so that it is drawn in several blocks
    values = np.repeat([0.0, 1.0], [300, 700])
    means = bootstrap.resampled_means(values.tolist(), "task", 4000)
    assert means.shape == (4000,)
    low, high = bootstrap.interval(means)
    error = np.sqrt(0.3 * 0.7 / 1000)
    np.testing.assert_allclose([low, high], [0.7 - 1.96 * error, 0.7 + 1.96 * error], atol=0.003)


def test_it_repeats_and_tasks_are_drawn_apart():
    values = np.random.default_rng(0).uniform(size=200).tolist()
    one, again, other = (bootstrap.resampled_means(values, name) for name in ("a", "a", "b"))
    np.testing.assert_array_equal(one, again)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.15
