"""How a step encodes the rows of a microbatch: without gradients, and with them, layer by layer.

The forward pass leaves what each layer keeps and, last, what the last layer gives: in buffers, for
later turns of a loop, or apart, for the same turn, with the layers written out one by one. That
compiles longer, and nothing is copied. What enters the first layer and how texts are pooled is
cheap: the backward pass computes it again. It adds the gradients of a layer where they belong, so
no array of all layers' stands in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from arcticjax.models.attention import Implementation
from arcticjax.models.encoder import Encoder
from arcticjax.models.layers import GatherLayer, Remat
from arcticjax.models.packing import segments_and_positions
from arcticjax.models.pooling import normalize, pool
from arcticjax.models.spec import Pooling
from arcticjax.parallel.sharding import Sharding
from arcticjax.step import activations
from arcticjax.step.activations import Kept, Pull, Restore

Passes = Literal["one", "two"]
# The backward pass of every layer, and what the last one gave.
Apart = tuple[list[Pull], jax.Array]
# `tokens` [G, S], `starts` and `lengths` [G, K] of a microbatch.
Rows = dict[str, jax.Array]


@dataclass(frozen=True)
class Encoding:
    """How a step encodes: everything but the shapes.

    dtype: of activations and matrix products; parameters, gradients, statistics, pooling and loss
    are float32. remat: what the backward pass of a layer computes again. attention: its
    implementation. apart: whether the second of two passes keeps activations apart.
    """

    encoder: Encoder
    pooling: Pooling
    dtype: Any = jnp.float32
    passes: Passes = "two"
    remat: Remat = "none"
    attention: Implementation = "xla"
    apart: bool = False

    def embed(self, params: Any, rows: Rows, sharding: Sharding | None = None) -> jax.Array:
        """An embedding for every slot of the rows, [G * K, D]; nothing is kept.

        sharding: of the parameters; None where every device has them whole.
        """
        vectors_GKD = self.encoder.embed(
            params,
            rows["tokens"],
            rows["starts"],
            rows["lengths"],
            pooling=self.pooling,
            dtype=self.dtype,
            remat=self.remat,
            attention=self.attention,
            gather_layer=_gather_layer(sharding),
        )
        return vectors_GKD.reshape(-1, vectors_GKD.shape[-1])

    def forward(
        self,
        params: Any,
        rows: Rows,
        buffers: Kept,
        microbatch: jax.Array | int,
        sharding: Sharding | None = None,
    ) -> tuple[jax.Array, Kept, Restore]:
        """As `embed`, and the buffers with what the backward pass needs at place `microbatch`, and
        how it reads that.

        buffers: for each array that a layer keeps [M, L, ...], and for the last states [M, ...].
        """
        *layered, last = buffers
        x_GSD = self._enter(params["embeddings"], params, rows)
        layer, shared, own = self._layer(params, rows, sharding)
        restore: Restore | None = None

        def one(index: jax.Array, carry: tuple[jax.Array, Kept]) -> tuple[jax.Array, Kept]:
            nonlocal restore
            x_GSD, layered = carry
            x_GSD, kept, restore = _differentiate(
                layer, x_GSD, _at(params["layers"], index), shared, _at(own, index)
            )
            return x_GSD, activations.store(layered, kept, microbatch, index)

        layers = self.encoder.spec.num_layers
        x_GSD, layered = lax.fori_loop(0, layers, one, (x_GSD, layered))
        assert restore is not None  # there is a layer
        (last,) = activations.store([last], [x_GSD], microbatch)
        return self._leave(_rest(params), x_GSD, params, rows), [*layered, last], restore

    def forward_apart(
        self, params: Any, rows: Rows, sharding: Sharding | None = None
    ) -> tuple[jax.Array, Apart]:
        """As `embed`, and what `backward_apart` needs."""
        x_GSD = self._enter(params["embeddings"], params, rows)
        layer, shared, own = self._layer(params, rows, sharding)
        pulls = []
        for index in range(self.encoder.spec.num_layers):
            x_GSD, pull = _vjp(layer, x_GSD, _at(params["layers"], index), shared, _at(own, index))
            pulls.append(pull)
        return self._leave(_rest(params), x_GSD, params, rows), (pulls, x_GSD)

    def backward(
        self,
        params: Any,
        rows: Rows,
        buffers: Kept,
        microbatch: jax.Array | int,
        restore: Restore,
        wanted_xD: jax.Array,
        gradients: Any,
        sharding: Sharding | None = None,
    ) -> Any:
        """`gradients`, a tree like `params`, with those of a microbatch added.

        wanted_xD: the gradient of each slot's embedding.
        """
        *layered, last = buffers
        (x_GSD,) = activations.load([last], microbatch)
        _, shared, own = self._layer(params, rows, sharding)
        layers = self.encoder.spec.num_layers

        def one(done: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            index = layers - 1 - done
            at_hand = _at(params["layers"], index), shared, _at(own, index)
            pull = restore(activations.load(layered, microbatch, index), at_hand)
            wanted_GSD, gradients = carry
            found, wanted_GSD = pull(wanted_GSD)
            return wanted_GSD, jax.tree.map(
                lambda total, one: total.at[index].add(one), gradients, found
            )

        def through_layers(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            return lax.fori_loop(0, layers, one, carry)

        return self._backward(params, rows, x_GSD, wanted_xD, gradients, through_layers)

    def backward_apart(
        self, params: Any, rows: Rows, kept: Apart, wanted_xD: jax.Array, gradients: Any
    ) -> Any:
        """As `backward`, of what `forward_apart` kept."""
        pulls, x_GSD = kept

        def through_layers(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            (wanted_GSD, gradients), found = carry, []
            for pull in reversed(pulls):
                of_layer, wanted_GSD = pull(wanted_GSD)
                found.insert(0, of_layer)
            # together, or every leaf of every layer takes a kernel of its own
            return wanted_GSD, jax.tree.map(
                lambda total, *parts: total + jnp.stack(parts), gradients, *found
            )

        return self._backward(params, rows, x_GSD, wanted_xD, gradients, through_layers)

    def _backward(
        self,
        params: Any,
        rows: Rows,
        x_GSD: jax.Array,
        wanted_xD: jax.Array,
        gradients: Any,
        through_layers: Callable[[tuple[jax.Array, Any]], tuple[jax.Array, Any]],
    ) -> Any:
        """From the embeddings to the token table; x_GSD: what the last layer gave;
        through_layers: (gradient of that, gradients of the layers) -> (gradient of what entered
        the first, gradients with this microbatch's)."""
        _, pull = jax.vjp(
            lambda rest, x_GSD: self._leave(rest, x_GSD, params, rows), _rest(params), x_GSD
        )
        of_rest, wanted_GSD = pull(wanted_xD)
        wanted_GSD, of_layers = through_layers((wanted_GSD, gradients["layers"]))
        of_embeddings = self._backward_of_embeddings(
            params, rows, wanted_GSD, gradients["embeddings"]
        )
        rest = jax.tree.map(jnp.add, _rest(gradients), of_rest)
        return {"embeddings": of_embeddings, "layers": of_layers, **rest}

    def kept(
        self, params: Any, rows: Rows, sharding: Sharding | None = None
    ) -> tuple[Kept, jax.Array]:
        """What one layer keeps of a microbatch, and what the last one gives."""
        x_GSD = self._enter(params["embeddings"], params, rows)
        layer, shared, own = self._layer(params, rows, sharding)
        x_GSD, kept, _ = _differentiate(layer, x_GSD, _at(params["layers"], 0), shared, _at(own, 0))
        return kept, x_GSD

    def _enter(self, embeddings: Any, params: Any, rows: Rows) -> jax.Array:
        positions_GS = _segments_and_positions(rows)[1]
        return self.encoder.enter(
            {**params, "embeddings": embeddings}, rows["tokens"], positions_GS, dtype=self.dtype
        )

    def _layer(
        self, params: Any, rows: Rows, sharding: Sharding | None
    ) -> tuple[Callable[..., jax.Array], Any, Any]:
        layer = self.encoder.layer(
            dtype=self.dtype,
            remat=self.remat,
            attention=self.attention,
            gather_layer=_gather_layer(sharding),
        )
        return layer, *self.encoder.layer_inputs(params, *_segments_and_positions(rows))

    def _leave(self, rest: Any, x_GSD: jax.Array, params: Any, rows: Rows) -> jax.Array:
        hidden_GSD = self.encoder.leave({**params, **rest}, x_GSD, dtype=self.dtype)
        vectors_GKD = normalize(pool(hidden_GSD, rows["starts"], rows["lengths"], self.pooling))
        return vectors_GKD.reshape(-1, vectors_GKD.shape[-1])

    def _backward_of_embeddings(
        self, params: Any, rows: Rows, wanted_GSD: jax.Array, gradients: Any
    ) -> Any:
        """The token table is by far the largest parameter and a microbatch touches few of its rows:
        only those are differentiated, a gradient of the whole would be zeros for the most part."""
        tokens = rows["tokens"].reshape(-1)
        small = {**params["embeddings"], "token": params["embeddings"]["token"][tokens]}
        places = {**rows, "tokens": jnp.arange(tokens.size).reshape(rows["tokens"].shape)}
        _, pull = jax.vjp(lambda small: self._enter(small, params, places), small)
        (found,) = pull(wanted_GSD)
        table = gradients["token"].at[tokens].add(found.pop("token"))
        rest = {name: one for name, one in gradients.items() if name != "token"}
        return {"token": table, **jax.tree.map(jnp.add, rest, found)}


def _differentiate(
    layer: Callable[..., jax.Array], x_GSD: jax.Array, params: Any, shared: Any, own: Any
) -> tuple[jax.Array, Kept, Restore]:
    """What a layer gives, what its backward pass needs, and how it reads that."""
    x_GSD, pull = _vjp(layer, x_GSD, params, shared, own)
    return x_GSD, *activations.take_apart(pull, (params, shared, own))


def _vjp(
    layer: Callable[..., jax.Array], x_GSD: jax.Array, params: Any, shared: Any, own: Any
) -> tuple[jax.Array, Pull]:
    return jax.vjp(lambda params, x_GSD: layer(params, x_GSD, shared, own), params, x_GSD)


def _at(arrays: Any, index: jax.Array | int) -> Any:
    """A layer's part of arrays of all layers."""
    return jax.tree.map(lambda one: lax.dynamic_index_in_dim(one, index, 0, keepdims=False), arrays)


def _rest(params: Any) -> Any:
    """What neither enters the first layer nor is a layer's."""
    return {name: one for name, one in params.items() if name not in ("embeddings", "layers")}


def _segments_and_positions(rows: Rows) -> tuple[jax.Array, jax.Array]:
    return segments_and_positions(rows["starts"], rows["lengths"], rows["tokens"].shape[1])


def _gather_layer(sharding: Sharding | None) -> GatherLayer | None:
    if sharding is None or sharding.mesh.shape["fsdp"] == 1:
        return None
    return sharding.gather_layer
