"""The step of a small encoder as a program, lowered or compiled from shapes alone.

python -m tests.step.scaling DEVICES ... prints facts of the program for each number, as JSON.
"""

import dataclasses
import json
import re
import sys
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import optax

from arcticjax.data.layout import Shapes
from arcticjax.models.encoder import Encoder
from arcticjax.models.spec import PRESETS
from arcticjax.parallel import mesh as meshes
from arcticjax.parallel.hlo import collectives
from arcticjax.parallel.sharding import make_sharding
from arcticjax.plan.compile import device_bytes
from arcticjax.step import state as states
from arcticjax.step import train as steps
from arcticjax.step.objective import Objective
from arcticjax.step.program import Program
from tests import tiny

PAIRS, TILE, WIDTH = 256, 96, tiny.SPEC.hidden_size


def make(devices, *, pairs=PAIRS, layers=2, rows=2, tile=TILE, dtype="float32", **options):
    """The training program on so many devices; `options` are of its `Encoding`."""
    mesh = meshes.make_mesh(devices)
    shapes = Shapes(devices, pairs, 32, rows, tiny.QUERY.longest, tiny.DOCUMENT.longest)
    encoder = Encoder(dataclasses.replace(tiny.SPEC, num_layers=layers))
    sharding = make_sharding({"params": encoder.abstract(), "loss": {}}, mesh)
    encoding = steps.Encoding(encoder, "cls", jnp.dtype(dtype), **options)
    objective = Objective(0.02, tile=tile)
    optimizer = optax.adamw(1e-4)
    step = steps.make_train_step(
        encoding, objective, shapes, sharding, optimizer, lambda step: 1e-4, 1.0
    )
    kept = steps.kept_shapes(encoding, shapes, sharding)
    return Program(encoding, objective, shapes, sharding, optimizer, step, kept)


def lowered(devices, **options):
    """The program as StableHLO."""
    program = make(devices, **options)
    with jax.set_mesh(program.mesh):
        return program.lower(
            program.abstract_state(), program.abstract_buffers(), program.abstract_batch()
        )


def facts(devices):
    """What grows with the devices: FLOPs of one device with all documents in one tile (cost
    analysis counts a loop once), temporaries, shapes of all arrays, collectives and the bytes they
    move by operation, and bytes of the optimiser for every preset."""
    compiled = lowered(devices).compile()
    text = compiled.as_text()
    moved, counted = Counter(), Counter()
    for one in collectives(text):
        moved[one.op] += one.bytes
        counted["in a loop" if one.in_loop else one.op] += 1
    shapes = set(re.findall(r"\b(?:f32|s32|u32|pred)\[([\d,]+)\]", text))
    return {
        "flops": lowered(devices, tile=2**20).cost_analysis()["flops"],
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "shapes": [list(map(int, shape.split(","))) for shape in shapes],
        "moved": moved,
        "counted": counted,
        "optimizer_bytes": {name: optimizer_bytes(spec, devices) for name, spec in PRESETS.items()},
    }


@cache
def abstract(spec):
    """Parameters, traced once for all numbers of devices."""
    return Encoder(spec).abstract()


def optimizer_bytes(spec, devices):
    """Of one of so many devices, for a model of these sizes."""
    arrays = {"params": abstract(spec), "loss": {}}
    sharding = make_sharding(arrays, meshes.make_mesh(devices))
    state = states.abstract_state(arrays, optax.adamw(1e-4), sharding)
    return device_bytes(state["optimizer"])


if __name__ == "__main__":
    print(json.dumps({devices: facts(int(devices)) for devices in sys.argv[1:]}))
