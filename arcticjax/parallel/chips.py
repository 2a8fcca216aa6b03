"""Chips that plans are made for: what one has."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What one chip has.

    sides: of a slice, 2 or 3. hbm_bytes: as much as the compiler gives a program. peak_flops: bf16
    a second. hbm_bandwidth, ici_bandwidth: bytes a second; the latter over all links of a chip in
    one direction, half of what is published as bidirectional. ring: a side of a slice that is a
    multiple of this closes into a ring.
    """

    name: str
    sides: int
    hbm_bytes: int
    peak_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    ring: int


# Peaks and bandwidths: docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e ("Peak compute per chip
# (bf16)", "HBM bandwidth", "Bidirectional inter-chip interconnect bandwidth"), and which slices are
# tori: 16x16 of v5e and v6e, cubes of 4x4x4 of v5p. Memory: what the compiler of libtpu 0.0.42 says
# is available when a program needs more (published: 16 GB, 95 GiB, 32 GB).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 2, int(15.75 * GIB), 197e12, 819e9, 200e9, 16),
        Chip("v5p", 3, int(95.74 * GIB), 459e12, 2765e9, 600e9, 4),
        Chip("v6e", 2, int(31.25 * GIB), 918e12, 1638e9, 400e9, 16),
    )
}
