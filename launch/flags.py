"""Compiler flags by device generation, as named presets.

    python -m launch.flags v6e -- python -m arcticjax.train --config FILE

runs the command with the preset's variables set (jax reads them when it starts); without a command
they are printed. What is in the variable already comes last, so it wins. None is on by default:
compare a run's pairs_per_second with and without.

An unknown flag ends a process at its start, so each preset names the versions of the package that
reads the flags under which all of them were accepted.
"""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet

from arcticjax.errors import ArgumentParser, ConfigError, run_cli

# A collective is cut into steps that run beside matrix products. MaxText,
# benchmarks/xla_flags_library.py (CF_FOR_ALL_GATHER: "Enabled by default but lets make sure"): our
# step's large collective is the all-gather of documents.
_OVERLAP = (
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_enable_async_all_gather=true",
)
# Reduces gradients between slices while other work goes on. MaxText, same file
# (DATA_PARALLEL_OVERLAP).
_SLICES = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
)
# On-chip memory that one fused operation may use. v6e: MaxText (_DENSE_VMEM_LIMIT) and levanter;
# v5e and v5p: levanter's default for them (lib/fray, default_env_vars).
_VMEM = "--xla_tpu_scoped_vmem_limit_kib={}"
# Accepted by the compiler of libtpu 0.0.42 (tests/launch/test_flags.py asks the installed one).
_LIBTPU = ">=0.0.42,<0.1"


@dataclass(frozen=True)
class Preset:
    """Environment variables, and which versions of which package know them."""

    variables: Mapping[str, str]
    package: str
    versions: str


def _tpu(vmem_kib: int, *more: str) -> Preset:
    arguments = " ".join((*_OVERLAP, *more, _VMEM.format(vmem_kib)))
    return Preset({"LIBTPU_INIT_ARGS": arguments}, "libtpu", _LIBTPU)


PRESETS = {
    "v5e": _tpu(50000),
    "v5e-slices": _tpu(50000, *_SLICES),
    "v5p": _tpu(50000),
    "v5p-slices": _tpu(50000, *_SLICES),
    "v6e": _tpu(98304),
    "v6e-slices": _tpu(98304, *_SLICES),
    # The latency-hiding scheduler is what NVIDIA's JAX images set, and 0.9 of the memory what its
    # guide names (docs.nvidia.com/jax-toolbox); jax takes 0.75.
    "gpu": Preset(
        {
            "XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
        },
        "jaxlib",
        ">=0.10.2,<0.13",
    ),
}
_LISTS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")


def preset(name: str) -> Preset:
    """The preset of a name; raises ConfigError."""
    if name not in PRESETS:
        raise ConfigError(f"flags: no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def variables(name: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of a preset, with what `environ` has in them.

    Raises ConfigError where the package that reads them is missing or of another version.
    """
    chosen = preset(name)
    try:
        found = importlib.metadata.version(chosen.package)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"flags: preset {name} needs {chosen.package}, which is not installed here"
        ) from None
    if not SpecifierSet(chosen.versions).contains(found, prereleases=True):
        raise ConfigError(
            f"flags: preset {name} is known to {chosen.package} {chosen.versions}, and this is "
            f"{found}, which may refuse to start with it; run without, or set the flags that you "
            f"have checked in {', '.join(chosen.variables)}"
        )
    merged = {}
    for variable, value in chosen.variables.items():
        before = environ.get(variable, "")
        if variable in _LISTS:
            merged[variable] = f"{value} {before}".strip()
        else:
            merged[variable] = before or value
    return merged


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the variables, or becomes the command."""
    parser = ArgumentParser(
        prog="python -m launch.flags",
        description="Run a command with a preset of compiler flags, or print them.",
    )
    parser.add_argument("preset", metavar="PRESET", help=", ".join(PRESETS))
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="after --")
    options = parser.parse_args(arguments)
    found = variables(options.preset, os.environ)
    if not options.command:
        for name, value in found.items():
            print(f"export {name}={shlex.quote(value)}")
        return 0
    try:
        # In its place, so that signals reach the command itself.
        os.execvpe(options.command[0], options.command, {**os.environ, **found})  # noqa: S606
    except OSError as error:
        raise ConfigError(
            f"{options.command[0]}: cannot be started: {error.strerror or error}"
        ) from None


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
