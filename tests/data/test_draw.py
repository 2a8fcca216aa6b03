import itertools
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from arcticjax.data import draw as draw_module
from arcticjax.data.draw import SORTED_SIZE, Draw, permutation_keys, permute
from arcticjax.errors import ConfigError, DataError

# Source, epoch and records of step 10**6: were they to change, no stored run could resume.
PINNED = "0 1510 3709 219 4446 4093 1614 1421 3859 4538"


def chi_square_excess(counts: np.ndarray, degrees: int) -> float:
    """Standard deviations by which Pearson's statistic against equal counts exceeds its mean."""
    expected = counts.mean()
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees))


@pytest.mark.parametrize(
    "size", [1, 2, 3, 5, 64, SORTED_SIZE, SORTED_SIZE + 1, 1100, 10_000, 99_991]
)
def test_permute_is_a_bijection(size):
    keys = permutation_keys("test", size)
    whole = permute(np.arange(size), size, keys)
    assert np.array_equal(np.sort(whole), np.arange(size))
    some = np.array([0, size - 1, size // 2])
    assert np.array_equal(permute(some, size, keys), whole[some])


def test_permute_of_a_huge_size_keeps_to_its_range_and_repeats_nothing():
    size = 400_000_007
    images = permute(np.arange(200_000), size, permutation_keys("huge"))
    assert images.min() >= 0 and images.max() < size
    assert len(np.unique(images)) == 200_000
    deciles = np.bincount(images * 10 // size, minlength=10)
    assert chi_square_excess(deciles, 9) < 4


# 1025 leaves 31 values of its 33 x 32 rectangle outside, so cycle walking is part of what is
# tested.
@pytest.mark.parametrize(("size", "trials"), [(5, 20_000), (16, 10_000), (1025, 6_000)])
def test_positions_pairs_and_steps_are_uniform(size, trials):
    ends = np.array([0, 1, size - 1])
    images = np.array([permute(ends, size, permutation_keys("u", k)) for k in range(trials)])
    for column in range(3):
        counts = np.bincount(images[:, column], minlength=size)
        assert abs(chi_square_excess(counts, size - 1)) < 4
    steps = np.bincount((images[:, 1] - images[:, 0]) % size, minlength=size)
    assert steps[0] == 0
    assert abs(chi_square_excess(steps[1:], size - 2)) < 4
    if size < 100:
        pairs = np.bincount(images[:, 0] * size + images[:, 2], minlength=size * size)
        off_diagonal = pairs.reshape(size, size)[~np.eye(size, dtype=bool)]
        assert abs(chi_square_excess(off_diagonal, off_diagonal.size - 1)) < 4


def test_a_permutation_shows_no_order():
    size = 20_000
    image = permute(np.arange(size), size, permutation_keys("order"))
    for lag in (1, 2, 141, 142, 1000):  # 142 columns: the network's own geometry must not show
        correlation = np.corrcoef(image[:-lag], image[lag:])[0, 1]
        assert abs(correlation) < 4 / np.sqrt(size)
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 4 / np.sqrt(size)


def test_at_is_pure_and_independent_of_call_order():
    steps = [0, 7, 3, 10**12, 1, 3, 0]
    first, second = Draw([5000, 300, 64], 64, 5), Draw([5000, 300, 64], 64, 5)
    forward = [first.at(step) for step in steps]
    backward = [second.at(step) for step in reversed(steps)][::-1]
    for one, other in zip(forward, backward, strict=True):
        assert (one.source, one.epoch) == (other.source, other.epoch)
        assert np.array_equal(one.records, other.records)


def test_at_is_the_same_in_another_process_and_release():
    code = (
        "from arcticjax.data.draw import Draw\n"
        "drawn = Draw([5000, 300], 8, 3).at(10**6)\n"
        "print(drawn.source, drawn.epoch, *drawn.records)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    drawn = Draw([5000, 300], 8, 3).at(10**6)
    assert output.stdout.split() == [str(x) for x in (drawn.source, drawn.epoch, *drawn.records)]
    assert output.stdout.split() == PINNED.split()


def test_a_cycle_is_one_exact_epoch_of_every_source():
    sizes, batch = [1000, 64, 333, 130], 64
    draw = Draw(sizes, batch, 11)
    assert draw.steps_per_epoch == sum(size // batch for size in sizes)
    leftovers = []
    for epoch in range(3):
        seen = {source: [] for source in range(len(sizes))}
        for step in range(epoch * draw.steps_per_epoch, (epoch + 1) * draw.steps_per_epoch):
            drawn = draw.at(step)
            assert drawn.epoch == epoch
            assert drawn.records.dtype == np.int64 and drawn.records.shape == (batch,)
            seen[drawn.source].append(drawn.records)
        for source, size in enumerate(sizes):
            records = np.concatenate(seen[source])
            assert len(seen[source]) == size // batch
            assert len(np.unique(records)) == len(records)
            assert 0 <= records.min() and records.max() < size
        leftovers.append(frozenset(range(1000)) - frozenset(np.concatenate(seen[0]).tolist()))
    assert len(set(leftovers)) == 3, "an epoch leaves out the same records as another"


def test_order_differs_between_seeds_epochs_and_sources():
    draw = Draw([6400, 6400], 64, 0)
    epochs = {}
    for step in range(2 * draw.steps_per_epoch):
        drawn = draw.at(step)
        epochs.setdefault((drawn.source, drawn.epoch), []).append(drawn)
    by_epoch = {key: np.concatenate([d.records for d in value]) for key, value in epochs.items()}
    other_seed = Draw([6400, 6400], 64, 1)
    by_epoch["seed"] = np.concatenate(
        [d.records for d in map(other_seed.at, range(other_seed.steps_per_epoch)) if d.source == 0]
    )
    for one, other in itertools.combinations(by_epoch.values(), 2):
        assert (one == other).mean() < 0.01
    orders = [
        [draw.at(cycle * draw.steps_per_epoch + step).source for step in range(200)]
        for cycle in range(2)
    ]
    orders.append([other_seed.at(step).source for step in range(200)])
    for one, other in itertools.combinations(orders, 2):
        assert 0.3 < np.mean(np.array(one) == np.array(other)) < 0.7


def test_sources_are_mixed_over_a_cycle():
    draw = Draw([64 * 300, 64 * 300], 64, 2)
    sources = np.array([draw.at(step).source for step in range(600)])
    runs = 1 + np.count_nonzero(sources[1:] != sources[:-1])
    assert abs(runs - 301) < 4 * np.sqrt(150)  # Wald and Wolfowitz: mean 301, variance about 150


def test_weights_set_the_shares_and_no_epoch_repeats_a_record():
    sizes, batch = [640, 6400, 64], 64  # 10, 100 and 1 batches
    draw = Draw(sizes, batch, 3, weights=[3, 1, 1e-9])
    assert draw.batches_per_cycle == (83, 28, 1)
    assert draw.steps_per_epoch == 112
    seen = {}
    shares = Counter()
    steps = 4 * draw.steps_per_epoch
    for step in range(steps):
        drawn = draw.at(step)
        shares[drawn.source] += 1
        seen.setdefault((drawn.source, drawn.epoch), []).append(drawn.records)
    assert shares == {0: 4 * 83, 1: 4 * 28, 2: 4}
    for (source, _), batches in seen.items():
        records = np.concatenate(batches)
        assert len(np.unique(records)) == len(records)
        assert len(records) <= sizes[source]
    # The source with the large weight goes on to its next epochs: 332 batches are 33 whole epochs
    # of 10, and 2 more.
    assert [len(seen[0, epoch]) for epoch in range(34)] == [10] * 33 + [2]
    assert sorted(epoch for source, epoch in seen if source == 1) == [0, 1]
    assert sorted(epoch for source, epoch in seen if source == 2) == [0, 1, 2, 3]


def test_weights_in_proportion_to_batches_are_the_draw_without_weights():
    plain, weighted = Draw([1000, 333], 64, 0), Draw([1000, 333], 64, 0, weights=[1.5, 0.5])
    assert weighted.batches_per_cycle == plain.batches_per_cycle == (15, 5)
    for step in range(40):
        assert np.array_equal(plain.at(step).records, weighted.at(step).records)


def test_huge_sources_and_steps():
    draw = Draw([400_000_000, 3_000_000], 1024, 0)
    drawn = [draw.at(10**12 + step) for step in range(50)]
    assert {d.epoch for d in drawn} <= {
        10**12 // draw.steps_per_epoch,
        10**12 // draw.steps_per_epoch + 1,
    }
    records = np.concatenate([d.records for d in drawn if d.source == 0])
    assert len(np.unique(records)) == len(records)
    assert records.max() > 390_000_000


def test_at_takes_less_than_a_millisecond():
    draw = Draw([400_000_000, 3_000_000, 5000], 1024, 0)
    seconds = []
    for step in range(100):
        start = time.perf_counter()
        draw.at(10**12 + step)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-3  # the fastest: the machine may be busy with other work


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(DataError, match="source 1 has 63 records"):
        Draw([64, 63], 64, 0)
    with pytest.raises(DataError, match="no source"):
        Draw([], 64, 0)
    with pytest.raises(ConfigError, match="global_batch"):
        Draw([64], 0, 0)
    with pytest.raises(ConfigError, match="weight of source 1"):
        Draw([64, 64], 64, 0, weights=[1, 0])
    with pytest.raises(ConfigError, match="weight of source 0"):
        Draw([64, 64], 64, 0, weights=[float("nan"), 1])
    with pytest.raises(ConfigError, match="1 weights for 2 sources"):
        Draw([64, 64], 64, 0, weights=[1])
    with pytest.raises(ValueError, match="step"):
        Draw([64], 64, 0).at(-1)


def test_keys_are_distinct():
    identities = itertools.product(["slots", "records"], range(20), range(20))
    keys = {permutation_keys(*identity).tobytes() for identity in identities}
    assert len(keys) == 800
    assert permutation_keys("a", 1, 12).tobytes() != permutation_keys("a", 11, 2).tobytes()
    assert draw_module.ROUNDS % 2 == 0
