"""Which records make up a global batch: a pure function of (seed, step), with no devices in it.

Counter arithmetic, with B the global batch, n_s the records of source s and b_s = floor(n_s / B)
its batches in an epoch. A *cycle* holds c_s batches of source s: c_s = b_s without weights, so that
one cycle is one epoch of every source, in proportion to size; with weights the counts are rounded
shares of as many batches. With C = sum of c_s:

    cycle, position = divmod(step, C)
    slot            = permutation of range(C), keyed by (seed, cycle), at `position`
    source s        : offset_s <= slot < offset_s + c_s, offset_s being the sum of counts before s
    counter         = cycle * c_s + slot - offset_s     a source meets 0, 1, 2, ... once each
    epoch, batch    = divmod(counter, b_s)
    records         = permutation of range(n_s), keyed by (seed, s, epoch), from batch * B on

A record is thus drawn at most once in an epoch of its source, and the n_s - b_s * B records that an
epoch leaves over are others in every epoch. A source with c_s > b_s passes several epochs in a
cycle; their batches interleave in time, because the slots of a cycle are shuffled as a whole.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arcticjax.errors import ConfigError, DataError

# Four rounds are the classical minimum for a network that looks random (Luby and Rackoff 1988).
ROUNDS = 8
# Up to here a permutation is a sort by keyed hashes: exact, where a Feistel network of a few values
# is biased.
SORTED_SIZE = 1024

_HALF = np.uint64(32)
# The odd multipliers of SplitMix64's finaliser (Steele, Lea and Flood 2014, variant 13 of
# Stafford).
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class Drawn:
    """One global batch: `records` (int64, [B], distinct) of `source` (an index), in its `epoch`."""

    source: int
    epoch: int
    records: np.ndarray


def permutation_keys(*identity: int | str) -> np.ndarray:
    """Round keys (uint64, [ROUNDS]) of one permutation; other identities give unrelated keys."""
    text = "/".join(str(part) for part in identity)
    digest = hashlib.blake2b(
        text.encode(), digest_size=8 * ROUNDS, person=b"arcticjax.draw"
    ).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def keyed_hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """A keyed bijection of uint64; the high 32 bits depend on every bit of value and key."""
    hashed = values + key
    hashed ^= hashed >> _HALF
    hashed *= _FIRST
    hashed ^= hashed >> _HALF
    hashed *= _SECOND
    return hashed


def _scramble(values: np.ndarray, rows: int, columns: int, keys: np.ndarray) -> np.ndarray:
    """A keyed bijection of range(rows * columns): a Feistel network over mixed-radix halves.

    A value is (row, column); each round shifts one of the two, modulo its range, by a hash of the
    other and a round key (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002, section
    5). Ranges are below 2**32.
    """
    shifted, other = np.divmod(values, np.uint64(columns))
    ranges = (np.uint64(rows), np.uint64(columns))
    for round_, key in enumerate(keys):
        shifted_range = ranges[round_ % 2]
        shift = keyed_hash(other, key)
        shift >>= _HALF
        shift *= shifted_range
        shift >>= _HALF  # uniform in [0, range): the high half of a product of two 32-bit numbers
        shifted += shift
        # Where it is below the range, subtracting wraps around to a huge number: the minimum is the
        # remainder.
        np.minimum(shifted, shifted - shifted_range, out=shifted)
        shifted, other = other, shifted
    return shifted * ranges[1] + other  # ROUNDS is even: the halves are back in their places


def permute(positions: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of range(size) sends `positions` (integers in [0, size)); int64.

    Time and memory are O(len(positions)). Above SORTED_SIZE the network's domain is the smallest
    rectangle with sides about the square root of `size`; an image outside range(size) is sent on
    until it falls inside (cycle walking), which fewer than one in sqrt(size) needs. `size` is at
    most 2**62.
    """
    if size <= SORTED_SIZE:
        hashes = keyed_hash(keyed_hash(np.arange(size, dtype=np.uint64), keys[0]), keys[1])
        return np.argsort(hashes, kind="stable")[positions].astype(np.int64)
    rows = math.isqrt(size - 1) + 1  # the square root, rounded up
    columns = -(-size // rows)
    images = _scramble(np.asarray(positions).astype(np.uint64), rows, columns, keys)
    outside = np.flatnonzero(images >= size)
    while outside.size:
        images[outside] = _scramble(images[outside], rows, columns, keys)
        outside = outside[images[outside] >= size]
    return images.astype(np.int64)


class Draw:
    """Draws global batches of `global_batch` records, each from one source of `sizes`.

    `weights` are relative shares of the batches (any positive scale); None means one exact epoch of
    every source in a cycle. Shares are rounded to whole batches of a cycle, at least one each.
    `batches_per_cycle` holds the counts c_s, `batches_per_epoch` the b_s (see the module). Raises
    DataError for a source that cannot fill one batch, ConfigError for weights that are not
    positive. Instances are immutable and safe to share between threads.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        global_batch: int,
        seed: int,
        weights: Sequence[float] | None = None,
    ):
        if global_batch < 1:
            raise ConfigError(f"train.global_batch is {global_batch}; it must be at least 1 pair")
        if not len(sizes):
            raise DataError("there is no source to draw from; list one in data.sources")
        for source, size in enumerate(sizes):
            if size < global_batch:
                raise DataError(
                    f"source {source} has {size} records, fewer than the global batch of "
                    f"{global_batch}, and every batch comes from one source; lower "
                    "train.global_batch, or set data.small_sources to merge or drop"
                )
        self.sizes = tuple(int(size) for size in sizes)
        self.global_batch = int(global_batch)
        self.seed = int(seed)
        self.batches_per_epoch = tuple(size // self.global_batch for size in self.sizes)
        self.batches_per_cycle = _cycle_counts(self.batches_per_epoch, weights)
        self._ends = np.cumsum(np.array(self.batches_per_cycle, dtype=np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one cycle; without weights, the whole batches of one epoch of all sources."""
        return int(self._ends[-1])

    def at(self, step: int) -> Drawn:
        """The global batch of `step` (>= 0, however large); the same in every process."""
        step = int(step)
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        cycle, position = divmod(step, self.steps_per_epoch)
        slot_keys = permutation_keys("slots", self.seed, cycle)
        slot = int(permute(np.array([position]), self.steps_per_epoch, slot_keys)[0])
        source = int(np.searchsorted(self._ends, slot, side="right"))
        in_cycle = self.batches_per_cycle[source]
        counter = cycle * in_cycle + slot - (int(self._ends[source]) - in_cycle)
        epoch, batch = divmod(counter, self.batches_per_epoch[source])
        start = batch * self.global_batch
        positions = np.arange(start, start + self.global_batch)
        record_keys = permutation_keys("records", self.seed, source, epoch)
        return Drawn(source, epoch, permute(positions, self.sizes[source], record_keys))


def _cycle_counts(
    batches_per_epoch: tuple[int, ...], weights: Sequence[float] | None
) -> tuple[int, ...]:
    """How many batches of each source a cycle holds."""
    if weights is None:
        return batches_per_epoch
    if len(weights) != len(batches_per_epoch):
        raise ConfigError(
            f"{len(weights)} weights for {len(batches_per_epoch)} sources; give every source one"
        )
    for source, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"the weight of source {source} is {weight}; it must be a positive number"
            )
    scale = sum(batches_per_epoch) / math.fsum(weights)
    return tuple(max(1, round(weight * scale)) for weight in weights)
