"""The training step: encode, gather, contrast, update; one compiled program for a whole run.

Encoder, loss and both passes run in one `shard_map` over the mesh. Parameters are cast to
device-varying once, before the loops, and gradients are reduced once, after them; otherwise every
layer of every microbatch would get its own all-reduce. The collectives of a step: one all-gather of
documents and its reduce-scatter, one (combined) all-reduce of gradients, scalars.

Two passes make memory independent of the batch (Gao et al. 2021, arXiv 2101.06983): the first
encodes all microbatches and keeps only embeddings; the loss gives the gradient of each embedding;
the second encodes again, with gradients. A step runs as many microbatches as its fullest device
needs, so one static shape serves all sources.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from arcticjax.data.layout import Shapes
from arcticjax.losses import infonce
from arcticjax.models.encoder import Encoder
from arcticjax.models.spec import Pooling
from arcticjax.parallel.mesh import AXES, BATCH, REPLICATED
from arcticjax.step.state import State

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
) -> Callable[[Any, Batch], tuple[Any, Metrics]]:
    """(params, batch) -> (gradients of the mean loss over the global batch, metrics).

    The batch is as `arcticjax.data.pipeline.HostBatch.arrays`, global, axis 0 = all N devices.
    dtype: of activations and matrix products; parameters, gradients, statistics, pooling and loss
    are float32.
    """

    def embed(params: Any, rows: Batch) -> jax.Array:
        vectors_GKD = encoder.embed(
            params, rows["tokens"], rows["starts"], rows["lengths"], pooling=pooling, dtype=dtype
        )
        return vectors_GKD.reshape(-1, vectors_GKD.shape[-1])

    def contrast(vectors_TD: jax.Array, batch: Batch) -> tuple[jax.Array, infonce.LossSums]:
        queries_bD, documents = vectors_TD[: shapes.pairs], vectors_TD[shapes.pairs :]
        documents_CD = jax.lax.all_gather(documents, AXES, tiled=True)
        columns_C = jax.lax.all_gather(batch["column_groups"], AXES, tiled=True)
        labels = infonce.Labels(batch["positives"], batch["row_groups"], columns_C)
        sums = infonce.tiled_infonce(
            queries_bD, documents_CD, labels, temperature=temperature, tile=tile
        )
        sums = jax.tree.map(lambda one: jax.lax.psum(one, AXES), sums)
        return sums.loss / jnp.maximum(sums.count, 1), sums

    def on_device(params: Any, batch: Batch) -> tuple[Any, Metrics]:
        batch = {name: array[0] for name, array in batch.items()}
        count = jax.lax.pmax(batch["microbatches"], AXES)
        varying = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, AXES, to="varying"), params)

        def rows_of(microbatch: jax.Array) -> Batch:
            return {
                name: jax.lax.dynamic_index_in_dim(batch[name], microbatch, 0, keepdims=False)
                for name in _ROWS
            }

        def first_pass(microbatch: jax.Array, vectors_TD: jax.Array) -> jax.Array:
            rows = rows_of(microbatch)
            return vectors_TD.at[rows["places"].reshape(-1)].set(embed(varying, rows), mode="drop")

        def second_pass(microbatch: jax.Array, gradients: Any) -> Any:
            rows = rows_of(microbatch)
            # The token table is by far the largest parameter and a microbatch touches few of its
            # rows: differentiate with respect to the rows it looks up, and add only those.
            tokens, looked_up = rows["tokens"].reshape(-1), _token_table(varying)
            small = _with_token_table(varying, looked_up[tokens])
            places = {**rows, "tokens": jnp.arange(tokens.size).reshape(rows["tokens"].shape)}
            _, pull = jax.vjp(lambda params: embed(params, places), small)
            wanted = cotangents_TD.at[rows["places"].reshape(-1)].get(mode="fill", fill_value=0)
            found = pull(wanted)[0]
            table = _token_table(gradients).at[tokens].add(_token_table(found))
            rest = jax.tree.map(
                jnp.add, _with_token_table(gradients, None), _with_token_table(found, None)
            )
            return _with_token_table(rest, table)

        empty_TD = jnp.zeros((shapes.texts, encoder.spec.hidden_size), jnp.float32)
        vectors_TD = jax.lax.fori_loop(
            0, count, first_pass, jax.lax.pcast(empty_TD, AXES, to="varying")
        )
        (loss, sums), cotangents_TD = jax.value_and_grad(contrast, has_aux=True)(vectors_TD, batch)
        gradients = jax.lax.fori_loop(0, count, second_pass, jax.tree.map(jnp.zeros_like, varying))
        gradients = jax.lax.psum(gradients, AXES)

        tokens = jax.lax.psum(batch["lengths"].sum().astype(jnp.float32), AXES)
        slots = mesh.size * count * (shapes.rows * shapes.row_length)
        terms = jnp.maximum(sums.count, 1)
        return gradients, {
            "loss": loss,
            "accuracy": sums.correct / terms,
            "positive_score": sums.positive_score / terms,
            "hardest_negative_score": sums.hardest_negative_score / terms,
            "tokens": tokens,
            "fill": tokens / slots.astype(jnp.float32),
            "microbatches": count,
        }

    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(REPLICATED, BATCH), out_specs=(REPLICATED, P())
    )


def _token_table(params: Any) -> Any:
    return params["embeddings"]["token"]


def _with_token_table(params: Any, table: Any) -> Any:
    return {**params, "embeddings": {**params["embeddings"], "token": table}}


def make_train_step(
    gradient: Callable[[Any, Batch], tuple[Any, Metrics]],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """(state, batch) -> (state, metrics), to be jitted with the state donated.

    A gradient that is not finite leaves parameters and optimiser as they were and is reported as
    `finite` = False.
    """

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        gradients, metrics = gradient(state["params"], batch)
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
        return {"step": state["step"] + 1, "params": params, "optimizer": moments}, metrics

    return train_step
