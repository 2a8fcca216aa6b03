"""What a step minimises: the contrastive loss of a device's embeddings against those of all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from arcticjax.losses import (
    Contrast,
    DistillationSums,
    Guide,
    Labels,
    LossSums,
    candidate_infonce,
    kl_divergence,
    margin_mse,
    tiled_infonce,
)
from arcticjax.parallel.mesh import AXES, gather

Learned = dict[str, Any]
Texts = tuple[jax.Array, jax.Array | None]


@dataclass(frozen=True)
class Distillation:
    """What of a teacher is learned; the fields are those of `DistillationConfig`."""

    kind: Literal["kl", "margin_mse"]
    weight: float
    teacher_temperature: float | None = None


@dataclass(frozen=True)
class Objective:
    """The loss of a run; its fields are those of `LossConfig`, whose descriptions say what they
    do. guide_margin: None without a guide."""

    temperature: float
    learn_temperature: bool = False
    symmetric: bool = False
    query_query: bool = False
    document_query: bool = False
    document_document: bool = False
    matryoshka: tuple[tuple[int, float], ...] = ()
    margin: float | None = None
    guide_margin: float | None = None
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    tile: int = 1024
    in_batch_negatives: bool = True
    distillation: Distillation | None = None

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

    @jax.named_scope("loss")
    def __call__(
        self,
        learned: Learned,
        vectors_TD: jax.Array,
        batch: dict[str, jax.Array],
        guided_TG: jax.Array | None = None,
    ) -> tuple[jax.Array, LossSums]:
        """The mean loss over the global batch, and the sums that metrics come from.

        To be called inside `shard_map`. vectors_TD: this device's queries, then its documents, as
        in `arcticjax.data.layout`; batch: its labels, as `HostBatch.arrays` without axis 0;
        guided_TG: the guide's vectors of the same texts, where there is one. The documents of all
        devices are gathered once, and queries too if a term needs them; without in-batch negatives
        nothing is gathered.
        """
        queries_bD, documents_CD = jnp.split(vectors_TD, [len(batch["positives"])])
        temperature = self.current_temperature(learned)
        if self.in_batch_negatives:
            documents_CD = self._gather(documents_CD)
            queries_bD = queries_bD.astype(documents_CD.dtype)
            loss, sums = self._shared(temperature, queries_bD, documents_CD, batch, guided_TG)
        else:
            sums = candidate_infonce(
                queries_bD,
                documents_CD,
                batch["positives"],
                batch["negatives"],
                temperature=temperature,
                sizes=self.matryoshka or None,
                margin=self.margin,
            )
            sums = _all(sums)
            loss = _mean(sums)
        if self.distillation is not None:
            taught = self._taught(self.distillation, temperature, queries_bD, documents_CD, batch)
            loss = (1 - self.distillation.weight) * loss + self.distillation.weight * taught
        return loss, sums

    def _shared(
        self,
        temperature: jax.Array,
        queries_bD: jax.Array,
        documents_CD: jax.Array,
        batch: dict[str, jax.Array],
        guided_TG: jax.Array | None,
    ) -> tuple[jax.Array, LossSums]:
        """Queries against the documents of all."""
        rows_b, positives_bP = batch["row_groups"], batch["positives"]
        columns_C = gather(batch["column_groups"])
        options: Any = {
            "temperature": temperature,
            "tile": self.tile,
            "sizes": self.matryoshka or None,
            "margin": self.margin,
            "guide_margin": self.guide_margin or 0.0,
        }
        # Texts by the encoder, and by the guide or None.
        queries: Texts = (queries_bD, None)
        documents: Texts = (documents_CD, None)
        if guided_TG is not None:
            guided_bG, guided_CG = jnp.split(guided_TG, [len(rows_b)])
            guided_CG = self._gather(guided_CG)
            queries = queries_bD, guided_bG.astype(guided_CG.dtype)
            documents = documents_CD, guided_CG
        contrasts = []
        if self.symmetric or self.query_query or self.document_query:
            all_queries, groups_B = jax.tree.map(self._gather, queries), gather(rows_b)
        if self.symmetric or self.document_query or self.document_document:
            first_b = jnp.maximum(positives_bP[:, 0], 0)
            own = jax.tree.map(lambda texts: jnp.take(texts, first_b, axis=0), documents)
        if self.query_query:
            contrasts.append(_contrast(queries, all_queries, groups_B))
        if self.document_query:
            contrasts.append(_contrast(own, all_queries, groups_B))
        if self.document_document:
            contrasts.append(_contrast(own, documents, columns_C))
        sums = tiled_infonce(
            queries[0],
            documents[0],
            Labels(positives_bP, rows_b, columns_C),
            contrasts=contrasts,
            guide=_guide(queries, documents),
            **options,
        )
        sums = _all(sums)
        loss = _mean(sums)
        if self.symmetric:
            # Row i is now the document of pair i, and its positive the query of pair i.
            first = lax.axis_index(AXES) * len(rows_b)
            queries_b1 = (first + jnp.arange(len(rows_b), dtype=jnp.int32))[:, None]
            queries_b1 = jnp.where(positives_bP[:, :1] >= 0, queries_b1, -1)
            back = tiled_infonce(
                own[0],
                all_queries[0],
                Labels(queries_b1, rows_b, groups_B),
                guide=_guide(own, all_queries),
                **options,
            )
            loss = (loss + _mean(_all(back))) / 2
        return loss, sums

    def _taught(
        self,
        distillation: Distillation,
        temperature: jax.Array,
        queries_bD: jax.Array,
        documents_CD: jax.Array,
        batch: dict[str, jax.Array],
    ) -> jax.Array:
        """The mean distillation loss over the global batch."""
        teacher_bC = batch["teacher"]
        known_bC = jnp.isfinite(teacher_bC)
        teacher_bC = jnp.where(known_bC, teacher_bC, 0)
        candidates_bC = jnp.concatenate([batch["positives"], batch["negatives"]], axis=1)
        candidates_bC = jnp.where(known_bC, candidates_bC, -1)
        if distillation.kind == "kl":
            sums = kl_divergence(
                queries_bD,
                documents_CD,
                candidates_bC,
                teacher_bC,
                temperature=temperature,
                teacher_temperature=distillation.teacher_temperature or self.temperature,
            )
        else:
            slots = batch["positives"].shape[1]
            sums = margin_mse(
                queries_bD,
                documents_CD,
                candidates_bC[:, :slots],
                candidates_bC[:, slots:],
                teacher_bC / (distillation.teacher_temperature or 1.0),
            )
        return _mean(_all(sums))

    def _gather(self, texts_xD: jax.Array) -> jax.Array:
        return _gather_half(texts_xD) if self.gather_dtype == "bfloat16" else gather(texts_xD)


def _guide(rows: Texts, columns: Texts) -> Guide | None:
    if rows[1] is None or columns[1] is None:
        return None
    return Guide(rows[1], columns[1])


def _contrast(rows: Texts, columns: Texts, groups_T: jax.Array) -> Contrast:
    return Contrast(rows[0], columns[0], groups_T, _guide(rows, columns))


def _all(sums: Any) -> Any:
    return jax.tree.map(lambda one: lax.psum(one, AXES), sums)


def _mean(sums: LossSums | DistillationSums) -> jax.Array:
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
