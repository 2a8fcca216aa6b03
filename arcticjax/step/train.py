"""The training step: encode, gather, contrast, update; one compiled program for a whole run.

Encoder, loss and both passes run in one `shard_map` over the mesh. Parameters are cast to
device-varying once, before the loops, and gradients are reduced once, after them; otherwise every
layer of every microbatch would get its own all-reduce. The collectives of a step: one all-gather of
documents and its reduce-scatter, one (combined) all-reduce of gradients, scalars.

The loss needs the embeddings of all microbatches before any of them can be differentiated. Two
passes make memory independent of the batch (Gao et al. 2021, arXiv 2101.06983): the first encodes
all microbatches and keeps only embeddings; the loss gives the gradient of each embedding; the
second encodes again, with gradients: four times the cost of a forward pass. One pass keeps what
the backward pass needs of every microbatch instead, for three. Either way a step runs as many
microbatches as its fullest device needs, so one static shape serves all sources.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from arcticjax.data.layout import Shapes
from arcticjax.losses import infonce
from arcticjax.models.encoder import Encoder
from arcticjax.models.spec import Pooling
from arcticjax.parallel.mesh import AXES, BATCH, REPLICATED, gather
from arcticjax.step import activations
from arcticjax.step.activations import Kept, Pull
from arcticjax.step.state import State

Passes = Literal["one", "two"]
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

_LABELS = ("positives", "row_groups", "column_groups")
_ROWS = ("tokens", "starts", "lengths", "places")


def make_gradient(
    encoder: Encoder,
    shapes: Shapes,
    mesh: Mesh,
    *,
    pooling: Pooling,
    temperature: float,
    tile: int,
    dtype: Any = jnp.float32,
    passes: Passes = "two",
) -> Callable[[Any, Kept, Batch], tuple[Any, Kept, Metrics]]:
    """(params, buffers, batch) -> (gradients of the mean loss over the global batch, buffers,
    metrics).

    The batch is as `arcticjax.data.pipeline.HostBatch.arrays`, global, axis 0 = all N devices.
    The buffers are those of `kept_shapes`, which says what they hold.
    dtype: of activations and matrix products; parameters, gradients, statistics, pooling and loss
    are float32.
    """
    embed = _make_embed(encoder, pooling, dtype, passes)

    def contrast(vectors_TD: jax.Array, batch: Batch) -> tuple[jax.Array, infonce.LossSums]:
        queries_bD, documents = vectors_TD[: shapes.pairs], vectors_TD[shapes.pairs :]
        documents_CD = gather(documents)
        columns_C = gather(batch["column_groups"])
        labels = infonce.Labels(batch["positives"], batch["row_groups"], columns_C)
        sums = infonce.tiled_infonce(
            queries_bD, documents_CD, labels, temperature=temperature, tile=tile
        )
        sums = jax.tree.map(lambda one: jax.lax.psum(one, AXES), sums)
        return sums.loss / jnp.maximum(sums.count, 1), sums

    def on_device(params: Any, buffers: Kept, batch: Batch) -> tuple[Any, Kept, Metrics]:
        batch = {name: array[0] for name, array in batch.items()}
        buffers = [buffer[0] for buffer in buffers]
        count = jax.lax.pmax(batch["microbatches"], AXES)
        varying = _vary(params)

        def rows_of(microbatch: jax.Array) -> Batch:
            return {
                name: jax.lax.dynamic_index_in_dim(batch[name], microbatch, 0, keepdims=False)
                for name in _ROWS
            }

        restore: Callable[[Kept], Pull]

        def first_pass(
            microbatch: jax.Array, carry: tuple[jax.Array, Kept]
        ) -> tuple[jax.Array, Kept]:
            nonlocal restore
            (vectors_TD, buffers), rows = carry, rows_of(microbatch)
            if passes == "one":
                vectors_xD, pull = _differentiate(embed, varying, rows)
                kept, restore = activations.take_apart(pull, varying)
                buffers = activations.store(buffers, kept, microbatch)
            else:
                vectors_xD = embed(varying, rows)
            places_x = rows["places"].reshape(-1)
            return vectors_TD.at[places_x].set(vectors_xD, mode="drop"), buffers

        def second_pass(microbatch: jax.Array, gradients: Any) -> Any:
            rows = rows_of(microbatch)
            if passes == "one":
                pull = restore(activations.load(buffers, microbatch))
            else:
                _, pull = _differentiate(embed, varying, rows)
            wanted = cotangents_TD.at[rows["places"].reshape(-1)].get(mode="fill", fill_value=0)
            found = pull(wanted)[0]
            tokens = rows["tokens"].reshape(-1)
            table = _token_table(gradients).at[tokens].add(_token_table(found))
            rest = jax.tree.map(
                jnp.add, _with_token_table(gradients, None), _with_token_table(found, None)
            )
            return _with_token_table(rest, table)

        empty_TD = jnp.zeros((shapes.texts, encoder.spec.hidden_size), jnp.float32)
        vectors_TD, buffers = jax.lax.fori_loop(0, count, first_pass, (_vary(empty_TD), buffers))
        (loss, sums), cotangents_TD = jax.value_and_grad(contrast, has_aux=True)(vectors_TD, batch)
        gradients = jax.lax.fori_loop(0, count, second_pass, jax.tree.map(jnp.zeros_like, varying))
        gradients = jax.lax.psum(gradients, AXES)

        tokens = jax.lax.psum(batch["lengths"].sum().astype(jnp.float32), AXES)
        slots = mesh.size * count * (shapes.rows * shapes.row_length)
        terms = jnp.maximum(sums.count, 1)
        metrics = {
            "loss": loss,
            "accuracy": sums.correct / terms,
            "positive_score": sums.positive_score / terms,
            "hardest_negative_score": sums.hardest_negative_score / terms,
            "tokens": tokens,
            "fill": tokens / slots.astype(jnp.float32),
            "microbatches": count,
        }
        return gradients, [buffer[None] for buffer in buffers], metrics

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(REPLICATED, BATCH, BATCH),
        out_specs=(REPLICATED, BATCH, P()),
    )


def kept_shapes(
    encoder: Encoder, shapes: Shapes, mesh: Mesh, *, pooling: Pooling, dtype: Any, passes: Passes
) -> list[jax.ShapeDtypeStruct]:
    """Buffers of a step: with one pass what every microbatch keeps, axes [N, microbatches, ...];
    with two passes none."""
    if passes == "two":
        return []
    embed = _make_embed(encoder, pooling, dtype, passes)

    # As in the step: what is kept includes constants once they vary over devices.
    def on_device(params: Any, rows: Batch) -> Kept:
        varying = _vary(params)
        rows = {name: array[0] for name, array in rows.items()}
        kept, _ = activations.take_apart(_differentiate(embed, varying, rows)[1], varying)
        return [one[None] for one in kept]

    kept = jax.shard_map(on_device, mesh=mesh, in_specs=(REPLICATED, BATCH), out_specs=BATCH)
    texts = jax.ShapeDtypeStruct((shapes.devices, shapes.rows, shapes.slots), jnp.int32)
    tokens = jax.ShapeDtypeStruct((shapes.devices, shapes.rows, shapes.row_length), jnp.int32)
    rows = {"tokens": tokens, "starts": texts, "lengths": texts}
    return [
        jax.ShapeDtypeStruct((one.shape[0], shapes.microbatches, *one.shape[1:]), one.dtype)
        for one in jax.eval_shape(kept, encoder.abstract(), rows)
    ]


def _make_embed(
    encoder: Encoder, pooling: Pooling, dtype: Any, passes: Passes
) -> Callable[[Any, Batch], jax.Array]:
    """(params, rows of a microbatch) -> an embedding for every slot of theirs, [G * K, D]."""

    def embed(params: Any, rows: Batch) -> jax.Array:
        vectors_GKD = encoder.embed(
            params,
            rows["tokens"],
            rows["starts"],
            rows["lengths"],
            pooling=pooling,
            dtype=dtype,
            remat="named" if passes == "one" else "none",
        )
        return vectors_GKD.reshape(-1, vectors_GKD.shape[-1])

    return embed


def _differentiate(
    embed: Callable[[Any, Batch], jax.Array], params: Any, rows: Batch
) -> tuple[jax.Array, Pull]:
    """The embeddings and their pullback to parameters, of the token table only the rows looked up.

    The table is by far the largest parameter and a microbatch touches few of its rows: a gradient
    of the whole would be zeros for the most part.
    """
    tokens = rows["tokens"].reshape(-1)
    small = _with_token_table(params, _token_table(params)[tokens])
    places = {**rows, "tokens": jnp.arange(tokens.size).reshape(rows["tokens"].shape)}
    return jax.vjp(lambda params: embed(params, places), small)


def _vary(arrays: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, AXES, to="varying"), arrays)


def _token_table(params: Any) -> Any:
    return params["embeddings"]["token"]


def _with_token_table(params: Any, table: Any) -> Any:
    return {**params, "embeddings": {**params["embeddings"], "token": table}}


def make_train_step(
    gradient: Callable[[Any, Kept, Batch], tuple[Any, Kept, Metrics]],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> Callable[[State, Kept, Batch], tuple[State, Kept, Metrics]]:
    """(state, buffers, batch) -> (state, buffers, metrics), to be jitted with state and buffers
    donated.

    A gradient that is not finite leaves parameters and optimiser as they were and is reported as
    `finite` = False.
    """

    def train_step(state: State, buffers: Kept, batch: Batch) -> tuple[State, Kept, Metrics]:
        gradients, buffers, metrics = gradient(state["params"], buffers, batch)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])

        def update() -> tuple[Any, Any]:
            changes, moments = optimizer.update(gradients, state["optimizer"], state["params"])
            return optax.apply_updates(state["params"], changes), moments

        params, moments = jax.lax.cond(
            finite, update, lambda: (state["params"], state["optimizer"])
        )
        metrics = {
            **metrics,
            "gradient_norm": norm,
            "learning_rate": schedule(state["step"]),
            "finite": finite,
        }
        state = {"step": state["step"] + 1, "params": params, "optimizer": moments}
        return state, buffers, metrics

    return train_step
