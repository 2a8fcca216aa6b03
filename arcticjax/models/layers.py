"""What the encoders of all families are made of, as Flax NNX modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from arcticjax.models.activations import GELU_SLOPE, gelu
from arcticjax.models.attention import ATTENTION, Implementation, attend, is_fused_attention
from arcticjax.models.norm import STATISTICS, normalized_sum
from arcticjax.models.precision import matmul_precision
from arcticjax.models.rotary import Rotation, rotate
from arcticjax.models.spec import ModelSpec

if TYPE_CHECKING:
    from jaxtyping import Array


# What the backward pass of a layer finds in memory: all of it; the results of matrix products and
# of attention; those, and what else is dear to compute again on a CPU; or its input alone.
Remat = Literal["none", "dots", "named", "full"]
_PRODUCT = "product"
_NAMES: dict[Remat, tuple[str, ...]] = {
    "dots": (_PRODUCT, *ATTENTION, STATISTICS),
    "named": (_PRODUCT, *ATTENTION, STATISTICS, "mlp inner", GELU_SLOPE),
    "full": (),
}

GatherLayer = Callable[[dict[str, Any]], dict[str, Any]]


# What a part of a layer adds to the states: a matrix product, in the dtype of its inputs, and the
# bias still to be added, if any.
Addend = tuple[jax.Array, jax.Array | None]


class Linear(nnx.Module):
    """A dense layer: product in the dtype of its input, its bias float32."""

    def __init__(
        self, inputs: int, outputs: int, deviation: float, rngs: nnx.Rngs, *, bias: bool = True
    ):
        self.kernel = nnx.Param(normal(rngs, (inputs, outputs), deviation))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32)) if bias else None

    def __call__(self, x: Array) -> Addend:
        """The product, and apart from it the bias: for what adds up more than that."""
        product = checkpoint_name(_product(x, self.kernel[...]), _PRODUCT)
        return product, None if self.bias is None else self.bias[...]


class LayerNorm(nnx.Module):
    """Normalisation over the last axis, statistics in float32."""

    def __init__(self, width: int, epsilon: float, *, bias: bool = True):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32)) if bias else None
        self.epsilon = epsilon

    @jax.named_scope("norm")
    def __call__(
        self,
        x: Array,
        addend: Addend | None = None,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> Array:
        """Normalises `x`, or the sum of it and what a part of a layer adds; in `dtype`."""
        shift = None if self.bias is None else self.bias[...]
        product, bias = (None, None) if addend is None else addend
        parts = (x,) if product is None else (x, product)
        return normalized_sum(parts, bias, self.scale[...], shift, self.epsilon, dtype)


class Attention(nnx.Module):
    """Self-attention with its output projection; the norm is its layer's to apply.

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

    @jax.named_scope("attention")
    def __call__(
        self,
        x_RSD: Array,
        segments_RS: Array,
        implementation: Implementation,
        rotation: Rotation | None = None,
        reach: Array | None = None,
    ) -> Addend:
        projections = self.query, self.key, self.value
        if implementation in ("cudnn", "packed"):
            parts = [_alone(x_RSD, projection) for projection in projections]
        else:
            parts = jnp.split(_together(x_RSD, *projections), 3, axis=-1)
        heads = (*x_RSD.shape[:2], self.num_heads, -1)
        query, key, value = (part.reshape(heads) for part in parts)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        mixed_RSHK = attend(query, key, value, segments_RS, implementation, reach)
        return self.output(mixed_RSHK.reshape(x_RSD.shape))


class Mlp(nnx.Module):
    """The two-layer perceptron with GELU; the norm is its layer's to apply."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        deviation = spec.initializer_range
        self.up = Linear(spec.hidden_size, spec.intermediate_size, deviation, rngs)
        self.down = Linear(spec.intermediate_size, spec.hidden_size, deviation, rngs)
        self.norm = LayerNorm(spec.hidden_size, spec.layer_norm_epsilon)

    @jax.named_scope("mlp")
    def __call__(self, x_RSD: Array) -> Addend:
        # rounded before the GELU: what its backward pass reads is the widest array here
        inner_RSE = gelu(_together(x_RSD, self.up))
        return self.down(checkpoint_name(inner_RSE, "mlp inner"))


class GatedMlp(nnx.Module):
    """down(activation(gate) * up); the norm is its layer's to apply.

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

    @jax.named_scope("mlp")
    def __call__(self, x_RSD: Array) -> Addend:
        gate_RSE, up_RSE = jnp.split(_together(x_RSD, self.gate, self.up), 2, axis=-1)
        return self.down(self.activation(gate_RSE) * up_RSE)


def rematerialised(layer: Callable, remat: Remat, gathers: bool) -> Callable:
    """`layer`, of which the backward pass finds in memory what `remat` says.

    gathers: whether it makes parameters whole that devices share. That is done again in the
    backward pass, so that no more than one layer is whole at a time (and none is dots then).
    """
    if remat == "none" and not gathers:
        return layer
    names = _NAMES["dots" if remat == "none" else remat]
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(*names)
    if names:
        policy = policies.save_from_both_policies(policy, is_fused_attention)
    # Loops over layers keep forward and backward apart by themselves.
    return jax.checkpoint(layer, prevent_cse=False, policy=policy)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], deviation: float) -> Array:
    """Normal numbers of mean 0, float32."""
    return deviation * jax.random.normal(rngs.params(), shape, jnp.float32)


def look_up(table: Array, ids: Array) -> Array:
    """Rows of a table; an id past it gives NaN, which the step reports (the default would clamp it
    silently)."""
    return table.at[ids].get(mode="fill", fill_value=jnp.nan)


def add(x: Array, addend: Addend) -> Array:
    """The states with what a part of a layer adds, float32."""
    return x.astype(jnp.float32) + _added(addend)


def _added(addend: Addend) -> Array:
    # The product leaves the matmul in the dtype of its inputs, so that its transposes in the
    # backward pass are matmuls of that dtype too; only the elementwise part around it is float32.
    product, bias = addend
    product = product.astype(jnp.float32)
    return product if bias is None else product + bias


def _together(x: Array, *layers: Linear) -> Array:
    """What layers of one input give, bias and all, side by side, in the dtype of x: one matmul
    several times as wide makes fewer, larger kernels and reads the input once."""
    biases = [layer.bias[...] for layer in layers if layer.bias is not None]
    kernel = jnp.concatenate([layer.kernel[...] for layer in layers], axis=1)
    bias = jnp.concatenate(biases) if biases else None
    return checkpoint_name(_added((_product(x, kernel), bias)).astype(x.dtype), _PRODUCT)


def _alone(x: Array, layer: Linear) -> Array:
    """What a layer gives, bias and all, in the dtype of x, as an array of its own: to cut a wide
    one up for cuDNN, and to join three gradients, takes longer than one wide product saves."""
    bias = None if layer.bias is None else layer.bias[...]
    return checkpoint_name(_affine(x, layer.kernel[...].astype(x.dtype), bias), _PRODUCT)


def _product(x: Array, kernel: Array) -> Array:
    return _matmul(x, kernel.astype(x.dtype))


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


@jax.custom_vjp
def _affine(x_RSI: Array, kernel_IO: Array, bias_O: Array | None) -> Array:
    """Product and bias, in the dtype of x and the kernel, for a GPU: cuBLAS adds the bias before it
    rounds, if the dtypes are one."""
    product_RSO = _matmul(x_RSI, kernel_IO)
    return product_RSO if bias_O is None else product_RSO + bias_O.astype(x_RSI.dtype)


def _affine_forward(
    x_RSI: Array, kernel_IO: Array, bias_O: Array | None
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return _affine(x_RSI, kernel_IO, bias_O), (x_RSI, kernel_IO, bias_O)


def _affine_backward(
    kept: tuple[Array, Array, Array | None], gradient_RSO: Array
) -> tuple[Array, Array, Array | None]:
    x_RSI, kernel_IO, bias_O = kept
    of_bias_O = None if bias_O is None else gradient_RSO.astype(jnp.float32).sum((0, 1))
    return *_matmul_backward((x_RSI, kernel_IO), gradient_RSO), of_bias_O


_affine.defvjp(_affine_forward, _affine_backward)
