"""The training program of a config: what a run compiles, and what `plan` compiles without a pod.

Everything here follows from the config, the sizes of the model, the lengths of the data and the
mesh; no weights and no tokens are needed, and the mesh may be of devices that are not there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from arcticjax import errors
from arcticjax.config.schema import RunConfig
from arcticjax.data import assemble, layout, list_pipeline, pipeline
from arcticjax.data.draw import Draw
from arcticjax.models import attention_choice
from arcticjax.models.attention import Implementation
from arcticjax.models.encoder import Encoder
from arcticjax.models.layers import Remat
from arcticjax.models.spec import ModelSpec, Pooling
from arcticjax.parallel import mesh as meshes
from arcticjax.parallel.sharding import Sharding, make_sharding
from arcticjax.step import activations
from arcticjax.step import optimizer as optimizers
from arcticjax.step import state as states
from arcticjax.step import train as steps
from arcticjax.step.encoding import Encoding, Passes
from arcticjax.step.objective import Distillation, Objective
from arcticjax.step.state import State

# Token slots of a microbatch at most, where train.microbatch is left out: what keeps a platform's
# matrix units busy.
_MICROBATCH_TOKENS = {"cpu": 2048, "tpu": 16384, "gpu": 32768}
# What a microbatch costs beside its slots, in tokens. A TPU reads the weights four times in
# bfloat16 and adds to the gradient in float32: 16 bytes a parameter, where a token takes 8 FLOPs a
# parameter. At the bandwidths and half the peaks of v5e and v5p that is the time of 240 and 170
# tokens, of which some is hidden behind computing. Measured on an H200, which starts some hundred
# kernels a layer: 2,000 tokens (m) to 3,600 (xs).
_OVERHEAD_TOKENS = {"cpu": 16, "tpu": 128, "gpu": 2048}
# What a multiply-add of attention takes over one of the matrices: short products and a softmax in
# memory. Measured on a CPU with heads of 32, one thread: 12 against 48 GFLOP/s.
_ATTENTION_COST = {"cpu": 4.0}
# Documents scored at once, where loss.tile is left out. On an H200 with 32,768 pairs of width 768
# in bfloat16 tiles of 1,024 take 36 ms, of 4,096 19 ms.
_TILES = {"gpu": 4096}


@dataclass(frozen=True)
class Program:
    """A training step and what it works on.

    encoding, objective, sharding: what the step does, and where; train_step: (state, buffers,
    batch) -> (state, buffers, metrics); kept: its buffers on all devices; declined_bytes: what
    `train.passes: auto` would have to keep on a device for one pass, where that was too much.
    guide: the frozen encoder of `loss.guide`.
    """

    encoding: Encoding
    objective: Objective
    shapes: layout.Shapes
    sharding: Sharding
    optimizer: optax.GradientTransformation
    train_step: Any
    kept: list[jax.ShapeDtypeStruct]
    declined_bytes: int | None = None
    guide: Encoding | None = None

    @property
    def mesh(self) -> Mesh:
        """The devices that the step runs on."""
        return self.sharding.mesh

    @property
    def encoder(self) -> Encoder:
        """The model."""
        return self.encoding.encoder

    def announcement(self) -> dict[str, Any]:
        """The step's entry among `compiled_shapes`."""
        shapes = self.shapes
        lists = {"positives": shapes.positives, "negatives": shapes.negatives}
        return {
            "program": "train_step",
            "devices": shapes.devices,
            "pairs_per_device": shapes.pairs,
            **(lists if shapes.documents > shapes.pairs else {}),
            **({"ladder": list(shapes.ladder)} if shapes.ladder else {}),
            "microbatches": shapes.microbatches,
            "rows": shapes.rows,
            "row_length": shapes.row_length,
            "slots_per_row": shapes.slots,
            "passes": self.encoding.passes,
            "remat": self.encoding.remat,
            "attention": self.encoding.attention,
            "kept_bytes": activations.buffer_bytes(self.kept),
        }

    def jitted(self) -> Any:
        """The step under `jax.jit`, its state and buffers donated."""
        return jax.jit(
            self.train_step,
            donate_argnums=(0, 1),
            compiler_options=meshes.compiler_options(self.mesh),
        )

    def lower(self, state: Any, buffers: Any, batch: Any) -> jax.stages.Lowered:
        """The step for arguments of these shapes and shardings, and for those of the guide's
        parameters where there is one; ready to compile."""
        guide = [] if self.guide is None else [self.abstract_guide()]
        return self.jitted().lower(state, buffers, batch, *guide)

    def initial_state(self, params: Any) -> State:
        """The state before the first step, on the mesh, from fp32 host arrays."""
        arrays = {"params": params, "loss": self.objective.init()}
        return states.init_state(arrays, self.optimizer, self.sharding)

    def abstract_state(self) -> State:
        """The initial state as shapes, dtypes and shardings."""
        arrays = {"params": self.encoder.abstract(), "loss": self.objective.init()}
        return states.abstract_state(arrays, self.optimizer, self.sharding)

    def abstract_buffers(self) -> Any:
        """The buffers as shapes, dtypes and shardings."""
        return meshes.lying(self.kept, meshes.batch_sharding(self.mesh))

    def abstract_guide(self) -> Any:
        """The guide's parameters as shapes, dtypes and shardings; None without a guide."""
        if self.guide is None:
            return None
        return meshes.lying(self.guide.encoder.abstract(), meshes.replicated(self.mesh))

    def abstract_batch(self) -> steps.Batch:
        """A batch as shapes, dtypes and shardings: that of `pipeline.HostBatch.arrays`, global."""
        shapes = self.shapes
        grid = (shapes.microbatches, shapes.rows)
        queries, objective = (shapes.pairs,), self.objective
        sizes: dict[str, tuple[int, ...]] = {
            "tokens": (*grid, shapes.row_length),
            "starts": (*grid, shapes.slots),
            "lengths": (*grid, shapes.slots),
            "places": (*grid, shapes.slots),
            "positives": (*queries, shapes.positives),
        }
        if objective.in_batch_negatives:
            sizes |= {"row_groups": queries, "column_groups": (shapes.documents,)}
        if not objective.in_batch_negatives or objective.distillation is not None:
            sizes["negatives"] = (*queries, shapes.negatives)
        if objective.distillation is not None:
            sizes["teacher"] = (*queries, shapes.positives + shapes.negatives)
        batch = {
            name: jax.ShapeDtypeStruct(
                (shapes.devices, *size), jnp.float32 if name == "teacher" else jnp.int32
            )
            for name, size in sizes.items()
        }
        return meshes.lying(batch, meshes.batch_sharding(self.mesh))


def make_draw(config: RunConfig, views: Sequence[Any]) -> Draw:
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
    views: Sequence[Any],
    draw: Draw,
    sides: Mapping[Any, assemble.Template],
    mesh: Mesh,
) -> layout.Shapes:
    """The shapes of a config's training step on a mesh, from the lengths of its data."""
    platform = mesh.devices.flat[0].platform
    devices, lists = mesh.devices.size, config.data.negatives
    sample = pipeline.sample_lengths if lists is None else list_pipeline.sample_lengths
    return pipeline.shapes_for(
        sample(views, draw, sides["query"], sides["document"], devices),
        sides["query"],
        sides["document"],
        devices=devices,
        pairs=draw.global_batch // devices,
        row_length=config.data.row_length,
        rows=config.train.microbatch,
        hidden_size=spec.hidden_size,
        # as of a perceptron of two matrices
        intermediate_size=spec.intermediate_size * spec.mlp_matrices // 2,
        most_tokens=_MICROBATCH_TOKENS[platform],
        overhead_tokens=_OVERHEAD_TOKENS[platform],
        attention_cost=_ATTENTION_COST.get(platform, 1.0),
        positives=config.data.positives,
        negatives=0 if lists is None else lists.count,
        ladder=_wanted_ladder(config, platform),
    )


def _wanted_ladder(config: RunConfig, platform: str) -> Sequence[int] | Literal["auto"]:
    """Rungs, or that they are to be chosen. Copying what is kept costs a sixth of a step on a GPU;
    elsewhere compiling longer was not seen to pay."""
    if config.train.ladder != "auto":
        return config.train.ladder
    return "auto" if platform == "gpu" and config.train.passes != "two" else ()


def make_builder(
    config: RunConfig,
    views: Sequence[Any],
    draw: Draw,
    shapes: layout.Shapes,
    sides: Mapping[Any, assemble.Template],
    local: Sequence[int],
    total_steps: int,
    pad_id: int,
) -> pipeline.BatchBuilder | list_pipeline.ListBatchBuilder:
    """What builds the batches of a config; local: positions of this process's devices."""
    if config.data.negatives is None:
        return pipeline.BatchBuilder(
            views, draw, shapes, sides["query"], sides["document"], local, pad_id
        )
    return list_pipeline.ListBatchBuilder(
        views,
        draw,
        shapes,
        sides["query"],
        sides["document"],
        local,
        total_steps=total_steps,
        shared=config.loss.in_batch_negatives,
        taught=config.loss.distillation is not None,
        pad_id=pad_id,
    )


def build(
    config: RunConfig,
    spec: ModelSpec,
    pooling: Pooling,
    shapes: layout.Shapes,
    mesh: Mesh,
    total_steps: int,
    memory: int | None,
    guide: tuple[ModelSpec, Pooling] | None = None,
) -> Program:
    """The training program of a config.

    memory: bytes of one device, or None where that cannot be told; it decides `train.passes: auto`.
    guide: sizes and pooling of the model of `loss.guide`.
    Raises ConfigError for a `train.attention` or `train.ladder` that the devices or shapes do not
    allow.
    """
    if shapes.ladder and shapes.ladder[-1] > shapes.room:
        raise errors.ConfigError(
            f"train.ladder: {shapes.ladder[-1]} rows are more than the {shapes.room} that the "
            f"{shapes.pairs} pairs of a device can fill; end it there, or take auto"
        )
    if config.optimizer.freeze_layers > spec.num_layers:
        raise errors.ConfigError(
            f"optimizer.freeze_layers: {config.optimizer.freeze_layers} is more than the "
            f"{spec.num_layers} layers of this model"
        )
    encoder, platform = Encoder(spec), mesh.devices.flat[0].platform
    objective = _objective(config, spec, platform)
    arrays = {"params": encoder.abstract(), "loss": objective.init()}
    sharding = make_sharding(arrays, mesh)
    train, dtype = config.train, jnp.dtype(config.train.precision)

    def attention(wanted: Literal["auto"] | Implementation, spec: ModelSpec) -> Implementation:
        return attention_choice.choose(
            wanted,
            device=mesh.devices.flat[0],
            dtype=train.precision,
            head_size=spec.head_size,
            row_length=shapes.row_length,
            windowed=spec.window is not None,
        )

    chosen_attention = attention(train.attention, spec)

    def encoding(passes: Passes) -> Encoding:
        # An accelerator computes what lies between products faster than it reads it from memory.
        usual: Remat = "dots" if platform != "cpu" else "named" if passes == "one" else "none"
        remat = usual if train.remat == "auto" else train.remat
        return Encoding(
            encoder, pooling, dtype, passes, remat, chosen_attention, apart=platform == "gpu"
        )

    chosen = encoding("two" if train.passes == "two" else "one")
    kept = steps.kept_shapes(chosen, shapes, sharding)
    needed = activations.buffer_bytes(kept)

    def too_much(needed: int) -> bool:
        return train.passes == "auto" and (memory is None or needed > memory // 4)

    at_once = max(shapes.ladder, default=0) * needed // shapes.room
    if train.ladder == "auto" and too_much(at_once):
        shapes = replace(shapes, ladder=())
    declined = not shapes.ladder and too_much(needed)
    if declined or shapes.ladder:
        chosen, kept = encoding("two"), []
    guiding = guide and Encoding(
        Encoder(guide[0]), guide[1], dtype, attention=attention("auto", guide[0])
    )
    optimizer = optimizers.make_optimizer(config.optimizer, total_steps)
    train_step = steps.make_train_step(
        chosen,
        objective,
        shapes,
        sharding,
        optimizer,
        optimizers.make_schedule(config.optimizer, total_steps),
        config.optimizer.clip_norm,
        functools.partial(optimizers.without_frozen, config.optimizer),
        guiding,
    )
    return Program(
        chosen,
        objective,
        shapes,
        sharding,
        optimizer,
        train_step,
        kept,
        declined_bytes=needed if declined else None,
        guide=guiding,
    )


def _objective(config: RunConfig, spec: ModelSpec, platform: str) -> Objective:
    loss = config.loss
    for index, one in enumerate(loss.matryoshka):
        if one.size > spec.hidden_size:
            raise errors.ConfigError(
                f"loss.matryoshka.{index}.size: {one.size} is more than the {spec.hidden_size} "
                "numbers of an embedding of this model"
            )
    return Objective(
        temperature=loss.temperature,
        learn_temperature=loss.learn_temperature,
        symmetric=loss.symmetric,
        query_query=loss.query_query,
        document_query=loss.document_query,
        document_document=loss.document_document,
        matryoshka=tuple((one.size, one.weight) for one in loss.matryoshka),
        margin=loss.margin,
        guide_margin=loss.guide and loss.guide.margin,
        gather_dtype=loss.gather,
        tile=loss.tile or usual_tile(platform),
        in_batch_negatives=loss.in_batch_negatives,
        distillation=loss.distillation
        and Distillation(
            loss.distillation.kind,
            loss.distillation.weight,
            loss.distillation.teacher_temperature,
        ),
    )


def usual_tile(platform: str) -> int:
    """`loss.tile` where it is left out."""
    return _TILES.get(platform, 1024)


def check_global_batch(global_batch: int, devices: int) -> None:
    """Refuses a global batch that does not divide among the devices, with a ConfigError."""
    if global_batch % devices:
        raise errors.ConfigError(
            f"train.global_batch: {global_batch} pairs do not divide among {devices} devices; take "
            f"a multiple of {devices}, such as {layout.round_up(global_batch, devices)}, or fewer "
            "devices (mesh.data)"
        )
