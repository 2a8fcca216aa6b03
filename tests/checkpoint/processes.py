"""Programs that two processes of two devices each run together, given as text."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# `make` gives a state for a seed, spread over all four devices or whole on each.
PREAMBLE = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("error")
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
port, rank, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from jax.experimental import multihost_utils
from arcticjax.checkpoint import CheckpointStore
from arcticjax.errors import CheckpointError, ConfigError, ResourceError

mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
def place(values, spec):
    shard = lambda index: values[index]
    return jax.make_array_from_callback(values.shape, NamedSharding(mesh, spec), shard)
def make(seed):
    draw = np.random.default_rng(seed).standard_normal
    return {"params": {"sharded": place(draw((64, 8), np.float32), PartitionSpec("data")),
                       "whole": place(draw((5, 3), np.float32), PartitionSpec())},
            "step": place(np.array(seed, np.int32), PartitionSpec())}
def same(left, right):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        for a, b in zip(one.addressable_shards, other.addressable_shards, strict=True):
            assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()
    return True
def raises(kind, action):
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")
target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(0))
"""


def run_two(program: str, *arguments: object) -> None:
    """Runs the preamble and then `program` in both; fails unless both come to its end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    text = PREAMBLE + textwrap.dedent(program) + 'print("passed", rank)\n'
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", text, port, str(rank), *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for rank, (worker, output) in enumerate(zip(workers, outputs, strict=True)):
        assert worker.returncode == 0 and f"passed {rank}" in output, "\n".join(outputs)
