"""BERT as Flax NNX modules: post-norm encoder layers, stacked and scanned."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from arcticjax.models.activations import GELU_SLOPE, gelu
from arcticjax.models.attention import Implementation, attend, matmul_precision
from arcticjax.models.spec import ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


# What the backward pass of a layer finds in memory: all of it, the results of matmuls, the arrays
# named below (results of matmuls but what the GELU gives, and what is dear to compute again), or
# its input alone.
Remat = Literal["none", "dots", "named", "full"]
_NAMED = ("attention inputs", "attention mixed", "attention output", "mlp inner", GELU_SLOPE)


class Linear(nnx.Module):
    """A dense layer: matmul in the dtype of its input, bias added in float32, result float32."""

    def __init__(self, inputs: int, outputs: int, deviation: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_normal(rngs, (inputs, outputs), deviation))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        return _project(x, self.kernel[...], self.bias[...])


class LayerNorm(nnx.Module):
    """Normalisation over the last axis, statistics and result in float32."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        # two-pass variance: the one-pass form loses digits when the mean is large
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...] + self.bias[...]


class Embeddings(nnx.Module):
    """The sum of token, position and type-0 vectors, normalised."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        deviation, width = spec.initializer_range, spec.hidden_size
        self.token = nnx.Param(_normal(rngs, (spec.vocab_size, width), deviation))
        self.position = nnx.Param(_normal(rngs, (spec.max_positions, width), deviation))
        self.type = nnx.Param(_normal(rngs, (spec.type_vocab_size, width), deviation))
        self.norm = LayerNorm(width, spec.layer_norm_epsilon)

    def __call__(self, tokens_RS: Array, positions_RS: Array) -> Array:
        # float32 whatever the compute dtype: the gradient of a gather adds up many small terms
        x_RSD = _look_up(self.token[...], tokens_RS) + _look_up(self.position[...], positions_RS)
        return self.norm(x_RSD + self.type[...][0])


class Attention(nnx.Module):
    """Self-attention with its output projection, residual and norm."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        deviation, width = spec.initializer_range, spec.hidden_size
        self.query = Linear(width, width, deviation, rngs)
        self.key = Linear(width, width, deviation, rngs)
        self.value = Linear(width, width, deviation, rngs)
        self.output = Linear(width, width, deviation, rngs)
        self.norm = LayerNorm(width, spec.layer_norm_epsilon)
        self.num_heads = spec.num_heads

    def __call__(self, x_RSD: Array, segments_RS: Array, implementation: Implementation) -> Array:
        parts = (self.query, self.key, self.value)
        # one matmul three times as wide: fewer, larger kernels and one read of the input
        fused_RSE = _project(
            x_RSD,
            jnp.concatenate([part.kernel[...] for part in parts], axis=1),
            jnp.concatenate([part.bias[...] for part in parts]),
        ).astype(x_RSD.dtype)
        fused_RSE = checkpoint_name(fused_RSE, "attention inputs")
        heads = (*x_RSD.shape[:2], self.num_heads, -1)
        query, key, value = (part.reshape(heads) for part in jnp.split(fused_RSE, 3, axis=-1))
        mixed_RSHK = attend(query, key, value, segments_RS, implementation)
        mixed_RSD = checkpoint_name(mixed_RSHK.reshape(x_RSD.shape), "attention mixed")
        output_RSD = checkpoint_name(self.output(mixed_RSD), "attention output")
        return self.norm(x_RSD.astype(jnp.float32) + output_RSD).astype(x_RSD.dtype)


class Mlp(nnx.Module):
    """The two-layer perceptron with GELU, residual and norm."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        deviation = spec.initializer_range
        self.up = Linear(spec.hidden_size, spec.intermediate_size, deviation, rngs)
        self.down = Linear(spec.intermediate_size, spec.hidden_size, deviation, rngs)
        self.norm = LayerNorm(spec.hidden_size, spec.layer_norm_epsilon)

    def __call__(self, x_RSD: Array) -> Array:
        # rounded before the GELU: its slope, kept for the backward pass, is the widest array here
        inner_RSE = checkpoint_name(gelu(self.up(x_RSD).astype(x_RSD.dtype)), "mlp inner")
        return self.norm(x_RSD.astype(jnp.float32) + self.down(inner_RSE)).astype(x_RSD.dtype)


class Layer(nnx.Module):
    """One encoder layer."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        self.attention = Attention(spec, rngs)
        self.mlp = Mlp(spec, rngs)

    def __call__(self, x_RSD: Array, segments_RS: Array, implementation: Implementation) -> Array:
        return self.mlp(self.attention(x_RSD, segments_RS, implementation))


class Bert(nnx.Module):
    """The whole encoder without pooler; every parameter of `layers` has the layer as axis 0."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        self.embeddings = Embeddings(spec, rngs)
        self.layers = nnx.vmap(lambda layer_rngs: Layer(spec, layer_rngs))(
            rngs.split(spec.num_layers)
        )

    def __call__(
        self,
        tokens_RS: Int[Array, "R S"],
        segments_RS: Int[Array, "R S"],
        positions_RS: Int[Array, "R S"],
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        remat: Remat = "none",
        attention: Implementation = "xla",
        gather_layer: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> Float[Array, "R S D"]:
        """Last hidden states in `dtype`. `remat`: what the backward pass computes again.
        `attention`: its implementation.

        `gather_layer` makes one layer's parameters whole where devices share them; that is done
        again in the backward pass, so that no more than one layer is whole at a time (and remat
        none is dots then).
        """
        definition, stacked = nnx.split(self.layers)

        def layer(x_RSD: Array, params: dict[str, Any]) -> tuple[Array, None]:
            if gather_layer is not None:
                params = gather_layer(params)
            return nnx.merge(definition, params)(x_RSD, segments_RS, attention), None

        stacked = nnx.to_pure_dict(stacked)
        body = _rematerialised(layer, remat, gather_layer is not None)
        x_RSD = self.embeddings(tokens_RS, positions_RS).astype(dtype)
        return jax.lax.scan(body, x_RSD, stacked)[0]


def _rematerialised(layer: Callable, remat: Remat, gathers: bool) -> Callable:
    policies = jax.checkpoint_policies
    if remat == "none" and not gathers:
        return layer
    if remat in ("none", "dots"):  # what is made of gathered parameters must not be kept
        policy = policies.dots_saveable
    else:
        policy = policies.save_only_these_names(*(_NAMED if remat == "named" else ()))
    # A scan keeps forward and backward apart by itself.
    return jax.checkpoint(layer, prevent_cse=False, policy=policy)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], deviation: float) -> Array:
    return deviation * jax.random.normal(rngs.params(), shape, jnp.float32)


def _project(x: Array, kernel: Array, bias: Array) -> Array:
    # The product leaves the matmul in the dtype of x, so that its transposes in the backward pass
    # are matmuls of that dtype too; only the elementwise part around it is float32.
    return _matmul(x, kernel.astype(x.dtype)).astype(jnp.float32) + bias


@jax.custom_vjp
def _matmul(x_RSI: Array, kernel_IO: Array) -> Array:
    """The product, in the dtype of both.

    Autodiff takes the kernel's gradient as [O, I] and transposes it, for which XLA on a CPU copies
    the incoming gradient into columns first: the backward pass of a matmul took 1.5 times as long.
    """
    return jnp.matmul(x_RSI, kernel_IO, precision=matmul_precision(x_RSI.dtype))


def _matmul_forward(x_RSI: Array, kernel_IO: Array) -> tuple[Array, tuple[Array, Array]]:
    return _matmul(x_RSI, kernel_IO), (x_RSI, kernel_IO)


def _matmul_backward(kept: tuple[Array, Array], gradient_RSO: Array) -> tuple[Array, Array]:
    x_RSI, kernel_IO = kept
    precision = matmul_precision(x_RSI.dtype)
    return (
        jnp.einsum("RSO,IO->RSI", gradient_RSO, kernel_IO, precision=precision),
        jnp.einsum("RSI,RSO->IO", x_RSI, gradient_RSO, precision=precision),
    )


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _look_up(table: Array, ids: Array) -> Array:
    # An id past the table gives NaN, which the step reports; the default would clamp it silently.
    return table.at[ids].get(mode="fill", fill_value=jnp.nan)
