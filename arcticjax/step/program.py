"""The training program of a config: what a run compiles, and what `plan` compiles without a pod.

Everything here follows from the config, the sizes of the model, the lengths of the data and the
mesh; no weights and no tokens are needed, and the mesh may be of devices that are not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from arcticjax import errors
from arcticjax.config.schema import RunConfig
from arcticjax.data import assemble, layout, pipeline
from arcticjax.data.catalog import SourceView
from arcticjax.data.draw import Draw
from arcticjax.models.encoder import Encoder
from arcticjax.models.spec import ModelSpec, Pooling
from arcticjax.parallel import mesh as meshes
from arcticjax.step import activations
from arcticjax.step import optimizer as optimizers
from arcticjax.step import train as steps
from arcticjax.step.state import State

# Token slots of a microbatch at most, where train.microbatch is left out: what keeps a platform's
# matrix units busy.
_MICROBATCH_TOKENS = {"cpu": 2048}
_MICROBATCH_TOKENS_ELSEWHERE = 16384
# What a microbatch costs beside its slots, in tokens. An accelerator reads the weights four times
# in bfloat16 and adds to the gradient in float32: 16 bytes a parameter, where a token takes 8 FLOPs
# a parameter. At the bandwidths and half the peaks of v5e, v5p and H200 that is the time of 240,
# 170 and 170 tokens, of which some is hidden behind computing.
_OVERHEAD_TOKENS = {"cpu": 16}
_OVERHEAD_TOKENS_ELSEWHERE = 128


@dataclass(frozen=True)
class Program:
    """A training step and what it works on.

    train_step: (state, buffers, batch) -> (state, buffers, metrics); kept: its buffers on all
    devices; passes: how many times it encodes a text; declined_bytes: what `train.passes: auto`
    would have to keep on a device for one pass, where that was too much.
    """

    encoder: Encoder
    shapes: layout.Shapes
    mesh: Mesh
    optimizer: optax.GradientTransformation
    train_step: Any
    passes: steps.Passes
    kept: list[jax.ShapeDtypeStruct]
    declined_bytes: int | None = None

    def lower(self, state: Any, buffers: Any, batch: Any) -> jax.stages.Lowered:
        """The step for arguments of these shapes and shardings, ready to compile; state and buffers
        are donated."""
        whole, cut = meshes.replicated(self.mesh), meshes.batch_sharding(self.mesh)
        step = jax.jit(self.train_step, donate_argnums=(0, 1), out_shardings=(whole, cut, whole))
        return step.lower(state, buffers, batch)

    def abstract_state(self) -> State:
        """The state as shapes, dtypes and shardings: that of `state.init_state`, without arrays."""
        params = self.encoder.abstract()
        state = {
            "step": jax.ShapeDtypeStruct((), jnp.int32),
            "params": params,
            "optimizer": jax.eval_shape(self.optimizer.init, params),
        }
        return lying(state, meshes.replicated(self.mesh))

    def abstract_buffers(self) -> Any:
        """The buffers as shapes, dtypes and shardings."""
        return lying(self.kept, meshes.batch_sharding(self.mesh))

    def abstract_batch(self) -> steps.Batch:
        """A batch as shapes, dtypes and shardings: that of `pipeline.HostBatch.arrays`, global."""
        shapes = self.shapes
        grid = (shapes.microbatches, shapes.rows)
        sizes: dict[str, tuple[int, ...]] = {
            "tokens": (*grid, shapes.row_length),
            "starts": (*grid, shapes.slots),
            "lengths": (*grid, shapes.slots),
            "places": (*grid, shapes.slots),
            "microbatches": (),
            "positives": (shapes.pairs, 1),
            "row_groups": (shapes.pairs,),
            "column_groups": (shapes.documents,),
        }
        batch = {
            name: jax.ShapeDtypeStruct((shapes.devices, *size), jnp.int32)
            for name, size in sizes.items()
        }
        return lying(batch, meshes.batch_sharding(self.mesh))


def make_draw(config: RunConfig, views: Sequence[SourceView]) -> Draw:
    """Which records make up each global batch of a config."""
    weights = [view.weight for view in views]
    return Draw(
        [len(view) for view in views],
        config.train.global_batch,
        config.run.seed,
        None if None in weights else [float(weight or 0) for weight in weights],
    )


def choose_shapes(
    config: RunConfig,
    spec: ModelSpec,
    views: Sequence[SourceView],
    draw: Draw,
    sides: Mapping[Any, assemble.Template],
    mesh: Mesh,
) -> layout.Shapes:
    """The shapes of a config's training step on a mesh, from the lengths of its data."""
    platform = mesh.devices.flat[0].platform
    return pipeline.choose_shapes(
        views,
        draw,
        sides["query"],
        sides["document"],
        devices=mesh.devices.size,
        row_length=config.data.row_length,
        rows=config.train.microbatch,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        most_tokens=_MICROBATCH_TOKENS.get(platform, _MICROBATCH_TOKENS_ELSEWHERE),
        overhead_tokens=_OVERHEAD_TOKENS.get(platform, _OVERHEAD_TOKENS_ELSEWHERE),
    )


def build(
    config: RunConfig,
    spec: ModelSpec,
    pooling: Pooling,
    shapes: layout.Shapes,
    mesh: Mesh,
    total_steps: int,
    memory: int | None,
) -> Program:
    """The training program of a config.

    memory: bytes of one device, or None where that cannot be told; it decides `train.passes: auto`.
    """
    encoder = Encoder(spec)
    dtype = jnp.dtype(config.train.precision)
    optimizer = optimizers.make_optimizer(config.optimizer, total_steps)
    wanted = config.train.passes
    passes: steps.Passes = "two" if wanted == "two" else "one"
    kept = steps.kept_shapes(encoder, shapes, mesh, pooling=pooling, dtype=dtype, passes=passes)
    needed = activations.buffer_bytes(kept)
    declined = wanted == "auto" and (memory is None or needed > memory // 4)
    if declined:
        passes, kept = "two", []
    gradient = steps.make_gradient(
        encoder,
        shapes,
        mesh,
        pooling=pooling,
        temperature=config.loss.temperature,
        tile=config.loss.tile,
        dtype=dtype,
        passes=passes,
    )
    schedule = optimizers.make_schedule(config.optimizer, total_steps)
    train_step = steps.make_train_step(gradient, optimizer, schedule)
    return Program(
        encoder,
        shapes,
        mesh,
        optimizer,
        train_step,
        passes,
        kept,
        declined_bytes=needed if declined else None,
    )


def check_global_batch(global_batch: int, devices: int) -> None:
    """Refuses a global batch that does not divide among the devices, with a ConfigError."""
    if global_batch % devices:
        raise errors.ConfigError(
            f"train.global_batch: {global_batch} pairs do not divide among {devices} devices; take "
            f"a multiple of {devices}, such as {layout.round_up(global_batch, devices)}, or fewer "
            "devices (mesh.data)"
        )


def lying(shapes: Any, sharding: NamedSharding) -> Any:
    """A tree of shapes and dtypes, each with a sharding."""
    return jax.tree.map(
        lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding), shapes
    )
