"""A tiny training step: its parts, its gradient and the whole of it."""

import jax
import numpy as np
import optax

from arcticjax.parallel import mesh as meshes
from arcticjax.parallel.sharding import make_sharding
from arcticjax.step import activations
from arcticjax.step import state as states
from arcticjax.step import train as steps
from arcticjax.step.objective import Objective

TEMPERATURE = 0.2
OBJECTIVE = Objective(TEMPERATURE, tile=8)


def make_parts(encoder, builder, mesh, *, objective=OBJECTIVE, **options):
    """What a step is made of, and its buffers."""
    encoding = steps.Encoding(encoder, "mean", **options)
    arrays = {"params": encoder.abstract(), "loss": objective.init()}
    sharding = make_sharding(arrays, mesh)
    kept = steps.kept_shapes(encoding, builder.shapes, sharding)
    return (encoding, objective, builder.shapes, sharding), activations.allocate(kept, mesh)


def placed(params, objective, sharding):
    arrays = {"params": params, "loss": objective.init()}
    return meshes.place(arrays, sharding.named(sharding.specs))


def whole(pieces, arrays):
    """Gradients in the shape of what they are gradients of, from the pieces of all devices."""

    def one(piece, leaf):
        rows = piece.shape[0]
        return np.asarray(piece)[:, : leaf.size // rows].reshape(leaf.shape)

    return jax.tree.map(one, pieces, arrays)


def gradient_program(
    encoder,
    params,
    builder,
    devices,
    *,
    fsdp=1,
    slices=1,
    objective=OBJECTIVE,
    guide=None,
    **options,
):
    """step -> (gradients, metrics), compiled once. guide: its encoding and parameters."""
    mesh = meshes.make_mesh(devices // fsdp, fsdp, slices)
    with jax.set_mesh(mesh):
        parts, kept = make_parts(encoder, builder, mesh, objective=objective, **options)
        program = jax.jit(steps.make_gradient(*parts, guide=guide and guide[0]), donate_argnums=1)
        arrays = placed(params, objective, parts[-1])
        guide_params = [meshes.replicate(mesh, guide[1])] if guide else []

    def one(step):
        nonlocal kept
        with jax.set_mesh(mesh):
            batch = meshes.host_to_global(mesh, builder(step).arrays)
            pieces, kept, metrics = program(arrays, kept, batch, *guide_params)
        found = whole(pieces, arrays)
        return (
            (found["params"], found["loss"], metrics)
            if found["loss"]
            else (found["params"], metrics)
        )

    return one


def make_step(encoder, params, builder, mesh, epsilon=1e-8, guide=None, **options):
    """A state, the compiled step and its buffers. guide: its encoding."""
    parts, kept = make_parts(encoder, builder, mesh, **options)
    objective, sharding = parts[1], parts[3]
    schedule = optax.constant_schedule(2e-3)
    optimizer = optax.adamw(schedule, eps=epsilon)
    step = jax.jit(
        steps.make_train_step(*parts, optimizer, schedule, guide=guide), donate_argnums=(0, 1)
    )
    arrays = {"params": params, "loss": objective.init()}
    return states.init_state(arrays, optimizer, sharding), step, kept
