"""GPUs that are not there, as jax's CUDA plugin describes them and compiles for them.

The plugin takes any GPU that is described to it (jax.experimental.topologies): neither a driver nor
a GPU is needed, and nothing is executed. Found by trial with jax 0.10.2 and its CUDA 12 plugin, and
with 0.11.2 and CUDA 13, which compile alike:

- The size is partitions x hosts of a partition x devices of a host; each host is a process.
- Devices have the description's name as `device_kind`, so attention is chosen as on a real one.
- Described devices report one slice. Real ones report one a host (XLA tells them apart by the boot
  of their machine), so a plan for several hosts asks for as many.
- No kernel is timed: where a real GPU would pick the fastest of several, and their scratch memory
  differs, XLA takes its usual one.
- A program that is too large is compiled as any other, and nothing is said.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from arcticjax import errors
from arcticjax.parallel.chips import Gpu

# What every GPU of these generations has, and the libraries that it is to have: CUDA 12.9, as jax
# 0.10.2 installs it, and the cuDNN of XLA's own descriptions. Plugins for CUDA 13 take it as well.
_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {block_shared_bytes}
  shared_memory_per_core: {shared_bytes}
  core_count: {cores}
  fpus_per_core: {lanes}
  clock_rate_ghz: {clock_ghz}
  l2_cache_size: {cache_bytes}
  device_memory_size: {hbm_bytes}
  memory_bandwidth: {hbm_bandwidth:.0f}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 9 patch: 0 }}
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{device_kind}"
"""
# Of a core's shared memory, what the system keeps of each block.
_RESERVED_SHARED_BYTES = 1024


def describe(gpu: Gpu) -> str:
    """A GPU in XLA's words: a GpuTargetConfigProto as text."""
    return _DESCRIPTION.format(
        **vars(gpu),
        block_shared_bytes=gpu.shared_bytes - _RESERVED_SHARED_BYTES,
        major=gpu.capability[0],
        minor=gpu.capability[1],
    )


def open_devices(name: str, gpu: Gpu, count: int) -> list[Any]:
    """`count` described devices, on as many hosts as they need.

    name: of the target, for messages. Raises ConfigError where the plugin is missing or does not
    take the description.
    """
    if not has_plugin():
        raise errors.ConfigError(
            f"--topology: {name} needs jax's CUDA plugin, which is not installed: "
            "install arcticjax[cuda] (uv run --extra cuda; Linux, some 3 GB; no GPU is needed), "
            "or plan for cpu:8"
        )
    from jax.experimental import topologies

    hosts = -(-count // gpu.per_host)
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name=gpu.name,
            topology=f"{hosts}x1x{count // hosts}",
            target_config=describe(gpu),
        ).devices
    except Exception as problem:  # jaxlib's own, without a class that could be named
        raise errors.ConfigError(
            f"--topology: jax's CUDA plugin cannot describe {name}: "
            f"{str(problem).splitlines()[0]}; it may be older than jax 0.10.2, or not of the "
            "version of jax: upgrade arcticjax[cuda]"
        ) from problem
    return list(found)


def has_plugin() -> bool:
    """Whether jax's CUDA plugin is installed, of any version of CUDA."""
    return any(
        one.name.startswith("xla_cuda")
        for one in importlib.metadata.entry_points(group="jax_plugins")
    )
