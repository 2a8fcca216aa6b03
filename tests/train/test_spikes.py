"""Losses far above those before them are told, and only those."""

import re

import numpy as np

from arcticjax.train.spikes import ENOUGH, Spikes


def test_a_spike_is_told_with_its_source_and_what_was_usual():
    spikes = Spikes()
    random = np.random.default_rng(0)
    for loss in random.normal(0.4, 0.02, 200):
        assert spikes.look("a", loss) is None
        assert spikes.look("b", 10 * loss) is None  # no spike of its own source
    said = spikes.look("a", 1.7)
    assert said is not None
    assert re.match("loss 1.7 of source 'a' is far above the median 0.(39|40)", said)
    assert spikes.look("b", 1.7) is None


def test_one_spike_does_not_hide_the_next():
    spikes = Spikes()
    for _ in range(ENOUGH):
        spikes.look("a", 0.4)
    assert spikes.look("a", 2.0) and spikes.look("a", 2.0)
    assert spikes.look("a", 0.401) is None  # losses that hardly vary


def test_a_falling_loss_and_a_beginning_are_no_spikes():
    spikes = Spikes()
    assert all(spikes.look("a", loss) is None for loss in np.geomspace(8.0, 0.1, 300))
    assert all(spikes.look("new", loss) is None for loss in [0.1] * (ENOUGH - 1) + [5.0])
