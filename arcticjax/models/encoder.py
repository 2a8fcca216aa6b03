"""The encoder as pure functions over a nested dict of parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from arcticjax.models.attention import Implementation
from arcticjax.models.families import FAMILIES
from arcticjax.models.layers import GatherLayer, Remat, rematerialised
from arcticjax.models.packing import segments_and_positions
from arcticjax.models.pooling import normalize, pool
from arcticjax.models.spec import ModelSpec, Pooling
from arcticjax.models.stack import Own, Shared, Stack

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Encoder:
    """Runs the model that a spec describes. Parameters are float32 and named as in
    `spec.parameter_shapes`; the functions are pure and may be traced by any jax transformation."""

    spec: ModelSpec

    def init(self, key: Array) -> dict[str, Any]:
        """Random parameters from a key: normal weights, zero biases, unit scales."""
        return nnx.to_pure_dict(nnx.state(self._module(nnx.Rngs(key)), nnx.Param))

    def abstract(self) -> dict[str, Any]:
        """Shapes and dtypes of the parameters; starts no backend."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))

    def hidden(
        self,
        params: dict[str, Any],
        tokens_RS: Int[Array, "R S"],
        segments_RS: Int[Array, "R S"],
        positions_RS: Int[Array, "R S"],
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        remat: Remat = "none",
        attention: Implementation = "xla",
        gather_layer: GatherLayer | None = None,
    ) -> Float[Array, "R S D"]:
        """Last hidden states of packed rows, in `dtype`, the dtype of matmuls and activations.

        `segments_RS` is 0 at padding and equal within a text; `positions_RS` restarts at 0 in every
        text. A token past its table, or a position past the table of those, gives NaN. `remat`
        trades computing again for the memory of the activations inside layers; `attention` is how
        attention is computed; `gather_layer` makes one layer's parameters whole where devices share
        them.
        """
        x_RSD = self.enter(params, tokens_RS, positions_RS, dtype=dtype)
        shared, own = self.layer_inputs(params, segments_RS, positions_RS)
        layer = self.layer(dtype=dtype, remat=remat, attention=attention, gather_layer=gather_layer)

        def one(x_RSD: Array, its: tuple[Any, Any]) -> tuple[Array, None]:
            return layer(its[0], x_RSD, shared, its[1]), None

        x_RSD, _ = jax.lax.scan(one, x_RSD, (params["layers"], own))
        return self.leave(params, x_RSD, dtype=dtype)

    @jax.named_scope("embeddings")
    def enter(
        self,
        params: dict[str, Any],
        tokens_RS: Int[Array, "R S"],
        positions_RS: Int[Array, "R S"],
        *,
        dtype: jax.typing.DTypeLike,
    ) -> Float[Array, "R S D"]:
        """What the first layer reads; arguments as for `hidden`."""
        return self._model(params).enter(tokens_RS, positions_RS, dtype)

    def layer_inputs(
        self,
        params: dict[str, Any],
        segments_RS: Int[Array, "R S"],
        positions_RS: Int[Array, "R S"],
    ) -> tuple[Shared, Own]:
        """What layers read beside states and parameters: all of them alike, and each of its own
        (axis 0). Nothing of it is differentiated."""
        model = self._model(params)
        return model.shared(segments_RS, positions_RS), model.own(segments_RS.shape[1])

    def layer(
        self,
        *,
        dtype: jax.typing.DTypeLike,
        remat: Remat = "none",
        attention: Implementation = "xla",
        gather_layer: GatherLayer | None = None,
    ) -> Callable[[dict[str, Any], Array, Shared, Own], Array]:
        """(a layer's parameters, states, what all layers read, what this one does) -> states;
        options as of `hidden`."""
        definition, _ = nnx.split(self._model(self.abstract()).layers)

        def layer(params: dict[str, Any], x_RSD: Array, shared: Shared, own: Own) -> Array:
            if gather_layer is not None:
                params = gather_layer(params)
            one = nnx.merge(definition, params)
            return one(x_RSD, shared, own, dtype=dtype, attention=attention)

        return rematerialised(layer, remat, gather_layer is not None)

    def leave(
        self, params: dict[str, Any], x_RSD: Float[Array, "R S D"], *, dtype: jax.typing.DTypeLike
    ) -> Float[Array, "R S D"]:
        """Last hidden states, from what the last layer gives."""
        return self._model(params).leave(x_RSD, dtype)

    def embedded(
        self, params: dict[str, Any], tokens_RS: Int[Array, "R S"], positions_RS: Int[Array, "R S"]
    ) -> Float[Array, "R S D"]:
        """What enters the first layer, in float32; arguments as for `hidden`."""
        return self._model(params).embeddings(tokens_RS, positions_RS)

    def embed(
        self,
        params: dict[str, Any],
        tokens_RS: Int[Array, "R S"],
        starts_RK: Int[Array, "R K"],
        lengths_RK: Int[Array, "R K"],
        *,
        pooling: Pooling,
        dtype: jax.typing.DTypeLike = jnp.float32,
        remat: Remat = "none",
        attention: Implementation = "xla",
        gather_layer: GatherLayer | None = None,
    ) -> Float[Array, "R K D"]:
        """Unit vectors in float32, one per slot; a slot of length 0 gives zeros and no gradient."""
        segments_RS, positions_RS = segments_and_positions(
            starts_RK, lengths_RK, tokens_RS.shape[1]
        )
        hidden_RSD = self.hidden(
            params,
            tokens_RS,
            segments_RS,
            positions_RS,
            dtype=dtype,
            remat=remat,
            attention=attention,
            gather_layer=gather_layer,
        )
        return normalize(pool(hidden_RSD, starts_RK, lengths_RK, pooling))

    @cached_property
    def _definition(self) -> nnx.GraphDef:
        return nnx.split(nnx.eval_shape(lambda: self._module(nnx.Rngs(0))), nnx.Param)[0]

    def _model(self, params: dict[str, Any]) -> Stack:
        return nnx.merge(self._definition, params)

    def _module(self, rngs: nnx.Rngs) -> Stack:
        return FAMILIES[self.spec.family].module(self.spec, rngs)
