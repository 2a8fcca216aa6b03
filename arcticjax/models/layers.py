"""What the encoders of all families are made of, as Flax NNX modules, and the scan over layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from arcticjax.models.activations import GELU_SLOPE, gelu
from arcticjax.models.attention import Implementation, attend
from arcticjax.models.precision import matmul_precision
from arcticjax.models.rotary import Rotation, rotate
from arcticjax.models.spec import ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Array


# What the backward pass of a layer finds in memory: all of it, the results of matmuls, the arrays
# named below (results of matmuls but what the GELU gives, and what is dear to compute again), or
# its input alone.
Remat = Literal["none", "dots", "named", "full"]
_NAMED = (
    "attention inputs",
    "attention mixed",
    "attention output",
    "mlp inputs",
    "mlp inner",
    GELU_SLOPE,
)

GatherLayer = Callable[[dict[str, Any]], dict[str, Any]]


class Linear(nnx.Module):
    """A dense layer: matmul in the dtype of its input, bias added in float32, result float32."""

    def __init__(
        self, inputs: int, outputs: int, deviation: float, rngs: nnx.Rngs, *, bias: bool = True
    ):
        self.kernel = nnx.Param(normal(rngs, (inputs, outputs), deviation))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32)) if bias else None

    def __call__(self, x: Array) -> Array:
        return _project(x, self.kernel[...], None if self.bias is None else self.bias[...])


class LayerNorm(nnx.Module):
    """Normalisation over the last axis, statistics and result in float32."""

    def __init__(self, width: int, epsilon: float, *, bias: bool = True):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32)) if bias else None
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        # two-pass variance: the one-pass form loses digits when the mean is large
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        return scaled if self.bias is None else scaled + self.bias[...]


class Attention(nnx.Module):
    """Self-attention with its output projection, float32; the norm is its layer's to apply.

    bias: of the four projections; norm_bias: of the norm.
    """

    def __init__(
        self, spec: ModelSpec, rngs: nnx.Rngs, *, bias: bool = True, norm_bias: bool = True
    ):
        deviation, width = spec.initializer_range, spec.hidden_size
        self.query = Linear(width, width, deviation, rngs, bias=bias)
        self.key = Linear(width, width, deviation, rngs, bias=bias)
        self.value = Linear(width, width, deviation, rngs, bias=bias)
        self.output = Linear(width, width, deviation, rngs, bias=bias)
        self.norm = LayerNorm(width, spec.layer_norm_epsilon, bias=norm_bias)
        self.num_heads = spec.num_heads

    def __call__(
        self,
        x_RSD: Array,
        segments_RS: Array,
        implementation: Implementation,
        rotation: Rotation | None = None,
        reach: Array | None = None,
    ) -> Array:
        fused_RSE = _fused(x_RSD, self.query, self.key, self.value)
        fused_RSE = checkpoint_name(fused_RSE, "attention inputs")
        heads = (*x_RSD.shape[:2], self.num_heads, -1)
        query, key, value = (part.reshape(heads) for part in jnp.split(fused_RSE, 3, axis=-1))
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        mixed_RSHK = attend(query, key, value, segments_RS, implementation, reach)
        mixed_RSD = checkpoint_name(mixed_RSHK.reshape(x_RSD.shape), "attention mixed")
        return checkpoint_name(self.output(mixed_RSD), "attention output")


class Mlp(nnx.Module):
    """The two-layer perceptron with GELU, float32; the norm is its layer's to apply."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        deviation = spec.initializer_range
        self.up = Linear(spec.hidden_size, spec.intermediate_size, deviation, rngs)
        self.down = Linear(spec.intermediate_size, spec.hidden_size, deviation, rngs)
        self.norm = LayerNorm(spec.hidden_size, spec.layer_norm_epsilon)

    def __call__(self, x_RSD: Array) -> Array:
        # rounded before the GELU: its slope, kept for the backward pass, is the widest array here
        inner_RSE = checkpoint_name(gelu(self.up(x_RSD).astype(x_RSD.dtype)), "mlp inner")
        return self.down(inner_RSE)


class GatedMlp(nnx.Module):
    """down(activation(gate) * up), float32; the norm is its layer's to apply.

    down_bias: of the last projection, the others have none; norm_bias: of the norm.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rngs: nnx.Rngs,
        activation: Callable[[Array], Array],
        *,
        down_bias: bool,
        norm_bias: bool = True,
    ):
        deviation, width, inner = spec.initializer_range, spec.hidden_size, spec.intermediate_size
        self.gate = Linear(width, inner, deviation, rngs, bias=False)
        self.up = Linear(width, inner, deviation, rngs, bias=False)
        self.down = Linear(inner, width, deviation, rngs, bias=down_bias)
        self.norm = LayerNorm(width, spec.layer_norm_epsilon, bias=norm_bias)
        self.activation = activation

    def __call__(self, x_RSD: Array) -> Array:
        inputs_RSE = checkpoint_name(_fused(x_RSD, self.gate, self.up), "mlp inputs")
        gate_RSE, up_RSE = jnp.split(inputs_RSE, 2, axis=-1)
        return self.down(self.activation(gate_RSE) * up_RSE)


def scan_layers(
    layers: nnx.Module,
    x: Array,
    run: Callable[..., Array],
    *per_layer: Array,
    remat: Remat,
    gather_layer: GatherLayer | None,
) -> Array:
    """The states after all layers, whose parameters are stacked on axis 0.

    run: (layer, states, the layer's element of each of `per_layer`) -> states. `gather_layer` makes
    one layer's parameters whole where devices share them; that is done again in the backward pass,
    so that no more than one layer is whole at a time (and remat none is dots then).
    """
    definition, stacked = nnx.split(layers)

    def layer(x: Array, own: tuple[dict[str, Any], ...]) -> tuple[Array, None]:
        params, *rest = own
        if gather_layer is not None:
            params = gather_layer(params)
        return run(nnx.merge(definition, params), x, *rest), None

    body = _rematerialised(layer, remat, gather_layer is not None)
    return jax.lax.scan(body, x, (nnx.to_pure_dict(stacked), *per_layer))[0]


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


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], deviation: float) -> Array:
    """Normal numbers of mean 0, float32."""
    return deviation * jax.random.normal(rngs.params(), shape, jnp.float32)


def look_up(table: Array, ids: Array) -> Array:
    """Rows of a table; an id past it gives NaN, which the step reports (the default would clamp it
    silently)."""
    return table.at[ids].get(mode="fill", fill_value=jnp.nan)


def _fused(x: Array, *parts: Linear) -> Array:
    """What layers of one input give, side by side, in the dtype of x: one matmul several times as
    wide makes fewer, larger kernels and reads the input once."""
    biases = [part.bias[...] for part in parts if part.bias is not None]
    kernel = jnp.concatenate([part.kernel[...] for part in parts], axis=1)
    return _project(x, kernel, jnp.concatenate(biases) if biases else None).astype(x.dtype)


def _project(x: Array, kernel: Array, bias: Array | None) -> Array:
    # The product leaves the matmul in the dtype of x, so that its transposes in the backward pass
    # are matmuls of that dtype too; only the elementwise part around it is float32.
    product = _matmul(x, kernel.astype(x.dtype)).astype(jnp.float32)
    return product if bias is None else product + bias


@jax.custom_vjp
def _matmul(x_RSI: Array, kernel_IO: Array) -> Array:
    """The product, in the dtype of both.

    XLA on a CPU copies the left matrix of the kernel's gradient into columns first, with all that
    it can fuse into the copy, a GELU's value among it. So the narrower of the two stands left: of
    the backward pass of a perceptron that is a fifth of the time.
    """
    return jnp.matmul(x_RSI, kernel_IO, precision=matmul_precision(x_RSI.dtype))


def _matmul_forward(x_RSI: Array, kernel_IO: Array) -> tuple[Array, tuple[Array, Array]]:
    return _matmul(x_RSI, kernel_IO), (x_RSI, kernel_IO)


def _matmul_backward(kept: tuple[Array, Array], gradient_RSO: Array) -> tuple[Array, Array]:
    x_RSI, kernel_IO = kept
    precision = matmul_precision(x_RSI.dtype)
    of_x_RSI = jnp.einsum("RSO,IO->RSI", gradient_RSO, kernel_IO, precision=precision)
    inputs, outputs = kernel_IO.shape
    if inputs <= outputs:
        return of_x_RSI, jnp.einsum("RSI,RSO->IO", x_RSI, gradient_RSO, precision=precision)
    return of_x_RSI, jnp.einsum("RSO,RSI->OI", gradient_RSO, x_RSI, precision=precision).T


_matmul.defvjp(_matmul_forward, _matmul_backward)
