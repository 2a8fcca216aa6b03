"""What a step minimises: the contrastive loss of a device's embeddings against those of all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from arcticjax.losses import Contrast, Labels, LossSums, tiled_infonce
from arcticjax.parallel.mesh import AXES, gather

Learned = dict[str, Any]


@dataclass(frozen=True)
class Objective:
    """The loss of a run; its fields are those of `LossConfig`, whose descriptions say what they
    do."""

    temperature: float
    learn_temperature: bool = False
    symmetric: bool = False
    query_query: bool = False
    document_query: bool = False
    document_document: bool = False
    matryoshka: tuple[tuple[int, float], ...] = ()
    margin: float | None = None
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    tile: int = 1024

    def init(self) -> Learned:
        """What the loss itself learns, as it starts: the logarithm of the temperature, or
        nothing."""
        if not self.learn_temperature:
            return {}
        return {"log_temperature": np.float32(math.log(self.temperature))}

    def current_temperature(self, learned: Learned) -> jax.Array:
        """The temperature in use, fp32."""
        if not self.learn_temperature:
            return jnp.float32(self.temperature)
        return jnp.exp(learned["log_temperature"])

    def __call__(
        self, learned: Learned, vectors_TD: jax.Array, batch: dict[str, jax.Array]
    ) -> tuple[jax.Array, LossSums]:
        """The mean loss over the global batch, and the sums that metrics come from.

        To be called inside `shard_map`. vectors_TD: this device's queries, then its documents, as
        in `arcticjax.data.layout`; batch: its labels, as `HostBatch.arrays` without axis 0. The
        documents of all devices are gathered once, and queries too if a term needs them.
        """
        queries_bD, documents = jnp.split(vectors_TD, [len(batch["row_groups"])])
        rows_b = batch["row_groups"]
        documents_CD = self._gather(documents)
        columns_C = gather(batch["column_groups"])
        queries_bD = queries_bD.astype(documents_CD.dtype)
        positives_bP = batch["positives"]
        options: Any = {
            "temperature": self.current_temperature(learned),
            "tile": self.tile,
            "sizes": self.matryoshka or None,
            "margin": self.margin,
        }
        contrasts = []
        if self.symmetric or self.query_query or self.document_query:
            queries_BD, groups_B = self._gather(queries_bD), gather(rows_b)
        if self.symmetric or self.document_query or self.document_document:
            own_bD = jnp.take(documents_CD, jnp.maximum(positives_bP[:, 0], 0), axis=0)
        if self.query_query:
            contrasts.append(Contrast(queries_bD, queries_BD, groups_B))
        if self.document_query:
            contrasts.append(Contrast(own_bD, queries_BD, groups_B))
        if self.document_document:
            contrasts.append(Contrast(own_bD, documents_CD, columns_C))
        sums = tiled_infonce(
            queries_bD,
            documents_CD,
            Labels(positives_bP, rows_b, columns_C),
            contrasts=contrasts,
            **options,
        )
        sums = jax.tree.map(lambda one: lax.psum(one, AXES), sums)
        loss = _mean(sums)
        if self.symmetric:
            # Row i is now the document of pair i, and its positive the query of pair i.
            first = lax.axis_index(AXES) * len(rows_b)
            queries_b1 = (first + jnp.arange(len(rows_b), dtype=jnp.int32))[:, None]
            queries_b1 = jnp.where(positives_bP[:, :1] >= 0, queries_b1, -1)
            back = tiled_infonce(
                own_bD, queries_BD, Labels(queries_b1, rows_b, groups_B), **options
            )
            loss = (loss + _mean(jax.tree.map(lambda one: lax.psum(one, AXES), back))) / 2
        return loss, sums

    def _gather(self, texts_xD: jax.Array) -> jax.Array:
        return _gather_half(texts_xD) if self.gather_dtype == "bfloat16" else gather(texts_xD)


def _mean(sums: LossSums) -> jax.Array:
    return sums.loss / jnp.maximum(sums.count, 1)


@jax.custom_vjp
def _gather_half(texts_xD: jax.Array) -> jax.Array:
    """Gathers in bfloat16; gradients of all devices are added in float32."""
    return gather(texts_xD.astype(jnp.bfloat16))


def _gather_half_forward(texts_xD: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _gather_half(texts_xD), texts_xD


def _gather_half_backward(texts_xD: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    _, pull = jax.vjp(gather, texts_xD.astype(jnp.float32))
    return (pull(gradient.astype(jnp.float32))[0].astype(texts_xD.dtype),)


_gather_half.defvjp(_gather_half_forward, _gather_half_backward)
