"""Chips that plans are made for, TPUs and GPUs: what one has."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from arcticjax import errors

GIB = 2**30
# Of a GPU's memory jax takes this share (docs.jax.dev/en/latest/gpu_memory_allocation.html), unless
# a variable says otherwise; the first name is the newer one.
_GPU_SHARE = 0.75
_GPU_SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@dataclass(frozen=True)
class Chip:
    """What one chip has.

    sides: of a slice, 2 or 3; 1 where chips are only counted. hbm_bytes: as much as the compiler
    gives a program. peak_flops: bf16 a second. hbm_bandwidth, ici_bandwidth: bytes a second; the
    latter over all links of a chip in one direction, half of what is published as bidirectional.
    ring: a side of a slice that is a multiple of this closes into a ring. float32_cost: how many
    times longer a product of float32 numbers takes to their accuracy.
    """

    name: str
    sides: int
    hbm_bytes: int
    peak_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    ring: int
    # As many passes through the bf16 units as jax's HIGHEST asks of a TPU.
    float32_cost: float = 6.0

    @property
    def usable_bytes(self) -> int:
        """Memory that programs may use."""
        return self.hbm_bytes


@dataclass(frozen=True, kw_only=True)
class Gpu(Chip):
    """What one GPU has; hbm_bytes: all that CUDA reports, of which jax takes a share.

    device_kind: as jax says it. per_host: GPUs that NVLink joins (`ici_bandwidth`);
    network_bandwidth: bytes a second that one of them sends to other hosts. What the compiler asks
    of the others: capability (CUDA's), cores (multiprocessors) with so many float32 lanes each,
    clock_ghz, cache_bytes (the second level), shared_bytes (of a core).
    """

    sides: int = 1
    ring: int = 1
    per_host: int = 8
    device_kind: str
    network_bandwidth: float
    capability: tuple[int, int]
    cores: int
    lanes: int
    clock_ghz: float
    cache_bytes: int
    shared_bytes: int

    @property
    def usable_bytes(self) -> int:
        """What jax takes of the memory; see `gpu_share`."""
        return int(gpu_share() * self.hbm_bytes)


def gpu_share() -> float:
    """The share of a GPU's memory that jax takes, by the variables that it reads. Raises
    ConfigError for one that is no share."""
    for name in _GPU_SHARE_VARIABLES:
        if text := os.environ.get(name):
            try:
                share = float(text)
            except ValueError:
                share = 0.0
            if not 0 < share <= 1:
                raise errors.ConfigError(f"{name}: {text!r} is not in (0, 1]; unset it, or say 0.9")
            return share
    return _GPU_SHARE


# Peaks and bandwidths: docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e ("Peak compute per chip
# (bf16)", "HBM bandwidth", "Bidirectional inter-chip interconnect bandwidth"), and which slices are
# tori: 16x16 of v5e and v6e, cubes of 4x4x4 of v5p. Memory: what the compiler of libtpu 0.0.42 says
# is available when a program needs more (published: 16 GB, 95 GiB, 32 GB).
_TPUS = (
    Chip("v5e", 2, int(15.75 * GIB), 197e12, 819e9, 200e9, 16),
    Chip("v5p", 3, int(95.74 * GIB), 459e12, 2765e9, 600e9, 4),
    Chip("v6e", 2, int(31.25 * GIB), 918e12, 1638e9, 400e9, 16),
)
# The SXM boards. Peaks (without sparsity; float32 outside of the matrix units, where jax's HIGHEST
# stays), memory bandwidths and NVLink: NVIDIA's data sheets of the A100 80GB, H100 and H200. The
# network: one adapter a GPU, of 200 Gb/s in a DGX A100, of 400 Gb/s in a DGX H100 and H200 (their
# user guides). The rest: descriptions that drivers gave, as XLA keeps them for its own tests
# (openxla/xla, xla/backends/gpu/target_config/specs); of the H200, one that was asked. Drivers
# differ by some MB of memory.
_H100 = Gpu(
    name="h100",
    device_kind="NVIDIA H100 80GB HBM3",
    hbm_bytes=84_942_979_072,
    peak_flops=989e12,
    hbm_bandwidth=3350e9,
    ici_bandwidth=450e9,
    float32_cost=989 / 67,
    network_bandwidth=50e9,
    capability=(9, 0),
    cores=132,
    lanes=128,
    clock_ghz=1.98,
    cache_bytes=50 * 2**20,
    shared_bytes=228 * 2**10,
)
_GPUS = (
    Gpu(
        name="a100",
        device_kind="NVIDIA A100-SXM4-80GB",
        hbm_bytes=85_100_068_864,
        peak_flops=312e12,
        hbm_bandwidth=2039e9,
        ici_bandwidth=300e9,
        float32_cost=312 / 19.5,
        network_bandwidth=25e9,
        capability=(8, 0),
        cores=108,
        lanes=64,
        clock_ghz=1.41,
        cache_bytes=40 * 2**20,
        shared_bytes=164 * 2**10,
    ),
    _H100,
    # The same processor with other memory.
    dataclasses.replace(
        _H100,
        name="h200",
        device_kind="NVIDIA H200",
        hbm_bytes=150_121_545_728,
        hbm_bandwidth=4800e9,
        cache_bytes=60 * 2**20,
    ),
)
CHIPS: dict[str, Chip] = {chip.name: chip for chip in (*_TPUS, *_GPUS)}
