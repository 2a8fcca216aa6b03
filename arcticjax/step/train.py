"""The training step: encode, gather, contrast, update; one compiled program for a whole run.

Encoder, loss, both passes and the update run in one `shard_map` over the mesh. Parameters are cast
to device-varying once, before the loops, and gradients are reduced once, after them; otherwise
every layer of every microbatch would get its own all-reduce. The collectives of a step: one
all-gather of documents and its reduce-scatter (neither without in-batch negatives), a
reduce-scatter of gradients and an all-gather of updated parameters for every leaf (see
`arcticjax.parallel.sharding`), scalars. With `fsdp` > 1 the layers' matrices are gathered inside
the loops too, and their gradients scattered there. A guide's documents are gathered beside the
others.

The loss needs the embeddings of all microbatches before any of them can be differentiated. Two
passes make memory independent of the batch (Gao et al. 2021, arXiv 2101.06983): the first encodes
all microbatches and keeps only embeddings; the loss gives the gradient of each embedding; the
second encodes again, with gradients: four times the cost of a forward pass. One pass keeps what
the backward pass needs of every microbatch instead, for three. Either way a step runs as many
microbatches as its fullest device needs, so one static shape serves all sources.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from arcticjax.data.layout import Shapes
from arcticjax.parallel.mesh import AXES, BATCH
from arcticjax.parallel.sharding import PIECE_AXES, PIECES, Sharding, pieces_spec
from arcticjax.step.activations import Kept, Restore
from arcticjax.step.encoding import Encoding
from arcticjax.step.objective import Objective
from arcticjax.step.optimizer import at_step
from arcticjax.step.state import State, trainable

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Trainable = dict[str, Any]
# The embeddings of a device's texts, and those of the guide.
_Texts = tuple[jax.Array, jax.Array | None]
# The loss with its sums, the gradient of its parameters, those of the encoder's, the buffers.
_Found = tuple[tuple[jax.Array, Any], Any, Any, Kept]

_ROWS = ("tokens", "starts", "lengths", "places")


def make_gradient(
    encoding: Encoding,
    objective: Objective,
    shapes: Shapes,
    sharding: Sharding,
    guide: Encoding | None = None,
) -> Callable[..., tuple[Trainable, Kept, Metrics]]:
    """(trainable, buffers, batch, and with a guide its parameters) -> (pieces of the gradient of
    the mean loss over the global batch, buffers, metrics), to be called on global arrays.

    See `make_train_step`; the pieces are what `Sharding.scatter` makes.
    """
    local_gradient = _make_local_gradient(
        encoding, objective, shapes, sharding, lambda pieces: pieces, guide
    )

    def gradient(
        arrays: Trainable, buffers: Kept, batch: Batch, guide_params: Any = None
    ) -> tuple[Trainable, Kept, Metrics]:
        return jax.shard_map(
            local_gradient,
            mesh=sharding.mesh,
            in_specs=(sharding.specs, BATCH, BATCH, P()),
            out_specs=(PIECES, BATCH, P()),
        )(arrays, buffers, batch, guide_params)

    return gradient


def make_train_step(
    encoding: Encoding,
    objective: Objective,
    shapes: Shapes,
    sharding: Sharding,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    clip_norm: float | None = None,
    trained: Callable[[Any], Any] = lambda gradients: gradients,
    guide: Encoding | None = None,
) -> Callable[..., tuple[State, Kept, Metrics]]:
    """(state, buffers, batch, and with a guide its parameters) -> (state, buffers, metrics), to be
    jitted with state and buffers donated.

    The batch is as `arcticjax.data.pipeline.HostBatch.arrays`, global, axis 0 = all N devices.
    The buffers are those of `kept_shapes`, which says what they hold. `sharding` is that of the
    state's `trainable`. trained: sets the gradient of what is frozen to 0. guide: a frozen encoder
    that reads the same rows and says what is no negative; its parameters are whole on every device.
    Gradients are scaled down to a global norm of `clip_norm`. A gradient that
    is not finite leaves parameters and optimiser as they were and is reported as `finite` = False.
    """
    local_gradient = _make_local_gradient(encoding, objective, shapes, sharding, trained, guide)

    def on_device(
        state: State, buffers: Kept, batch: Batch, guide_params: Any
    ) -> tuple[State, Kept, Metrics]:
        before = trainable(state)
        gradients, buffers, metrics = local_gradient(before, buffers, batch, guide_params)
        norm = metrics["gradient_norm"]
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        if clip_norm is not None:
            scale = clip_norm / jnp.maximum(norm, clip_norm)
            gradients = jax.tree.map(lambda piece: piece * scale, gradients)
        pieces = sharding.cut(before)
        moments = at_step(state["optimizer"], state["step"])
        with jax.named_scope("optimizer"):
            changes, moments = optimizer.update(gradients, moments, pieces)
        # Selecting, not branching: the parameters' all-gather must not hang on a condition.
        pieces, moments = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(pieces, changes), moments),
            (pieces, state["optimizer"]),
        )
        metrics = {**metrics, "learning_rate": schedule(state["step"]), "finite": finite}
        state = {
            "step": state["step"] + 1,
            **sharding.join(pieces, before),
            "optimizer": moments,
        }
        return state, buffers, metrics

    def train_step(
        state: State, buffers: Kept, batch: Batch, guide_params: Any = None
    ) -> tuple[State, Kept, Metrics]:
        specs = {
            "step": P(),
            **sharding.specs,
            "optimizer": jax.tree.map(pieces_spec, state["optimizer"]),
        }
        return jax.shard_map(
            on_device,
            mesh=sharding.mesh,
            in_specs=(specs, BATCH, BATCH, P()),
            out_specs=(specs, BATCH, P()),
        )(state, buffers, batch, guide_params)

    return train_step


def _make_local_gradient(
    encoding: Encoding,
    objective: Objective,
    shapes: Shapes,
    sharding: Sharding,
    trained: Callable[[Any], Any],
    guide: Encoding | None,
) -> Callable[[Trainable, Kept, Batch, Any], tuple[Trainable, Kept, Metrics]]:
    """`make_gradient` on one device."""
    passes = encoding.passes
    apart = passes == "two" and encoding.apart

    def on_device(
        arrays: Trainable, buffers: Kept, batch: Batch, guide_params: Any
    ) -> tuple[Trainable, Kept, Metrics]:
        batch = {name: array[0] for name, array in batch.items()}
        buffers = [buffer[0] for buffer in buffers]
        # Rows are filled in order, so those of the fullest device say how many microbatches run.
        used = jax.lax.pmax((batch["lengths"].sum(-1) > 0).sum(), AXES)
        count = -(-used // shapes.rows)
        varying = _vary(arrays)
        params = varying["params"]
        zeros = jax.tree.map(jnp.zeros_like, params)
        texts = _empty(encoding, shapes), None if guide is None else _empty(guide, shapes)

        def put(texts: _Texts, rows: Batch, vectors_xD: jax.Array) -> _Texts:
            """The embeddings of all texts, with those of some rows."""
            (vectors_TD, guided_TG), places_x = texts, rows["places"].reshape(-1)
            if guide is not None and guided_TG is not None:
                guided_xG = guide.embed(guide_params, rows)
                guided_TG = guided_TG.at[places_x].set(guided_xG, mode="drop")
            return vectors_TD.at[places_x].set(vectors_xD, mode="drop"), guided_TG

        def contrast(texts: _Texts) -> tuple[Any, Any, Callable[[Batch], jax.Array]]:
            """The loss with its sums, the gradient of its parameters, and what gives that of the
            embeddings of some rows."""
            vectors_TD, guided_TG = texts
            value, (learned, cotangents_TD) = jax.value_and_grad(
                objective, argnums=(0, 1), has_aux=True
            )(varying["loss"], vectors_TD, batch, guided_TG)

            def wanted(rows: Batch) -> jax.Array:
                places_x = rows["places"].reshape(-1)
                return cotangents_TD.at[places_x].get(mode="fill", fill_value=0)

            return value, learned, wanted

        def at_once(used: int) -> _Found:
            rows = {name: _first_rows(batch[name], used) for name in _ROWS}
            vectors_xD, kept = encoding.forward_apart(params, rows, sharding)
            value, learned, wanted = contrast(put(texts, rows, vectors_xD))
            gradients = encoding.backward_apart(params, rows, kept, wanted(rows), zeros)
            return value, learned, gradients, buffers

        def in_turn() -> _Found:
            def rows_of(microbatch: jax.Array) -> Batch:
                return {
                    name: jax.lax.dynamic_index_in_dim(batch[name], microbatch, 0, keepdims=False)
                    for name in _ROWS
                }

            restore: Restore

            def first_pass(
                microbatch: jax.Array, carry: tuple[_Texts, Kept]
            ) -> tuple[_Texts, Kept]:
                nonlocal restore
                (texts, buffers), rows = carry, rows_of(microbatch)
                if passes == "one":
                    vectors_xD, buffers, restore = encoding.forward(
                        params, rows, buffers, microbatch, sharding
                    )
                else:
                    vectors_xD = encoding.embed(params, rows, sharding)
                return put(texts, rows, vectors_xD), buffers

            all_texts, kept = jax.lax.fori_loop(0, count, first_pass, (texts, buffers))
            value, learned, wanted = contrast(all_texts)

            def second_pass(microbatch: jax.Array, carry: tuple[Any, Kept]) -> tuple[Any, Kept]:
                nonlocal restore
                (gradients, room), rows, place = carry, rows_of(microbatch), microbatch
                if apart:
                    _, kept = encoding.forward_apart(params, rows, sharding)
                    of_rows = wanted(rows)
                    return encoding.backward_apart(params, rows, kept, of_rows, gradients), room
                if passes == "two":
                    place = 0
                    _, room, restore = encoding.forward(params, rows, room, place, sharding)
                gradients = encoding.backward(
                    params, rows, room, place, restore, wanted(rows), gradients, sharding
                )
                return gradients, room

            if passes == "two" and not apart:  # for one microbatch at a time
                kept = _room(encoding, params, rows_of(jnp.int32(0)), sharding)
            gradients, kept = jax.lax.fori_loop(0, count, second_pass, (zeros, kept))
            return value, learned, gradients, kept if passes == "one" else buffers

        fits, rung, rows = shapes.rung(used)
        if shapes.ladder:
            branches = [functools.partial(at_once, rows) for rows in shapes.ladder]
            found = jax.lax.switch(jnp.where(fits, rung, len(branches)), [*branches, in_turn])
        else:
            found = in_turn()
        (loss, sums), learned, gradients, buffers = found
        pieces = trained(sharding.scatter({"params": gradients, "loss": learned}))
        squares = sum(jnp.sum(jnp.square(piece)) for piece in jax.tree.leaves(pieces))

        tokens = jax.lax.psum(batch["lengths"].sum().astype(jnp.float32), AXES)
        slots = sharding.mesh.size * shapes.row_length * rows
        terms = jnp.maximum(sums.count, 1)
        metrics = {
            "loss": loss,
            "accuracy": sums.correct / terms,
            "positive_score": sums.positive_score / terms,
            "hardest_negative_score": sums.hardest_negative_score / terms,
            "gradient_norm": jnp.sqrt(jax.lax.psum(squares, PIECE_AXES)),
            "tokens": tokens,
            "fill": tokens / slots.astype(jnp.float32),
            "microbatches": jnp.where(fits, 1, count),
        }
        if objective.learn_temperature:
            metrics["temperature"] = objective.current_temperature(arrays["loss"])
        return pieces, [buffer[None] for buffer in buffers], metrics

    return on_device


def kept_shapes(
    encoding: Encoding, shapes: Shapes, sharding: Sharding
) -> list[jax.ShapeDtypeStruct]:
    """Buffers of a step: with one pass what every layer of every microbatch keeps, axes [N,
    microbatches, layers, ...], and last what the last layers give, [N, microbatches, ...]; with
    two passes none. `sharding` is that of the trainable arrays."""
    if encoding.passes == "two":
        return []

    # As in the step: what is kept includes constants once they vary over devices.
    def on_device(params: Any, rows: Batch) -> tuple[Kept, jax.Array]:
        rows = {name: array[0] for name, array in rows.items()}
        return jax.tree.map(lambda one: one[None], encoding.kept(_vary(params), rows, sharding))

    kept = jax.shard_map(
        on_device,
        mesh=sharding.mesh,
        in_specs=(sharding.specs["params"], BATCH),
        out_specs=BATCH,
    )
    texts = jax.ShapeDtypeStruct((shapes.devices, shapes.rows, shapes.slots), jnp.int32)
    tokens = jax.ShapeDtypeStruct((shapes.devices, shapes.rows, shapes.row_length), jnp.int32)
    rows = {"tokens": tokens, "starts": texts, "lengths": texts}
    of_layer, last = jax.eval_shape(kept, encoding.encoder.abstract(), rows)
    layers = encoding.encoder.spec.num_layers

    def buffer(one: jax.ShapeDtypeStruct, *axes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((one.shape[0], *axes, *one.shape[1:]), one.dtype)

    return [
        *(buffer(one, shapes.microbatches, layers) for one in of_layer),
        buffer(last, shapes.microbatches),
    ]


def _room(encoding: Encoding, params: Any, rows: Batch, sharding: Sharding) -> Kept:
    """Buffers for one microbatch, within the step; what they hold at first is never read, and not
    written where the platform knows uninitialised memory."""
    of_layer, last = jax.eval_shape(lambda: encoding.kept(params, rows, sharding))
    layers = encoding.encoder.spec.num_layers
    shapes = [*((1, layers, *one.shape) for one in of_layer), (1, *last.shape)]
    return _vary(
        [
            jax.lax.empty(shape, one.dtype)
            for shape, one in zip(shapes, [*of_layer, last], strict=True)
        ]
    )


def _first_rows(array_MGx: jax.Array, rows: int) -> jax.Array:
    """The first rows of all microbatches."""
    return array_MGx.reshape(-1, *array_MGx.shape[2:])[:rows]


def _empty(encoding: Encoding, shapes: Shapes) -> jax.Array:
    """Room for the embeddings of a device's texts."""
    width = encoding.encoder.spec.hidden_size
    return _vary(jnp.zeros((shapes.texts, width), jnp.float32))


def _vary(arrays: Any) -> Any:
    """Marks arrays as differing between all devices, whether or not they do already along some
    axes."""

    def one(leaf: jax.Array) -> jax.Array:
        axes = tuple(axis for axis in AXES if axis not in jax.typeof(leaf).mat.varying)
        return jax.lax.pcast(leaf, axes, to="varying") if axes else leaf

    return jax.tree.map(one, arrays)
