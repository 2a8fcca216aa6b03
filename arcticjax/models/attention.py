"""Attention within the texts of packed rows: one function, several implementations.

`xla` and `looped` run everywhere and in every dtype; `looped` takes the heads of a row one after
another (see `arcticjax.models.looped`). `cudnn` is NVIDIA's fused kernel through `jax.nn`, which
takes segments and windows only as a mask [R, 1, S, S]; its packed layout is not in jax's public
interface. `packed` are Pallas kernels for NVIDIA GPUs that skip what no text of a block sees (see
`arcticjax.models.packed_attention`). `splash` is the Pallas kernel for TPUs (see
`arcticjax.models.splash`), without windows.
Which of them a device can run, and which one `auto` takes, is the matter of
`arcticjax.models.attention_choice`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from arcticjax import errors
from arcticjax.models import looped
from arcticjax.models.precision import MASKED, matmul_precision

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

Implementation = Literal["xla", "looped", "cudnn", "packed", "splash"]
# Names, to rematerialisation policies, of what attention gives and of what its backward pass needs
# beside that.
ATTENTION = (looped.MIXED, looped.STATISTICS)

SPLASH_NO_WINDOW = "it knows no windows, and some layers of this model attend within one"


def attend(
    query_RSHK: Float[Array, "R S H K"],
    key_RSHK: Float[Array, "R S H K"],
    value_RSHK: Float[Array, "R S H K"],
    segments_RS: Int[Array, "R S"],
    implementation: Implementation = "xla",
    reach: Int[Array, ""] | None = None,
) -> Float[Array, "R S H K"]:
    """Softmax attention in which a token sees the tokens of its own segment only, and of those the
    ones up to `reach` places away where that is given; scores scaled by 1 / sqrt(K).

    Padding (segment 0) is a segment of its own: its output is finite and reaches no text. Scores
    and softmax are float32 for every input dtype; the output has the dtype of the values. Raises
    ConfigError where jax finds no cuDNN, or none that takes these shapes, and for splash with a
    `reach`.
    """
    if implementation == "cudnn":
        return _cudnn(query_RSHK, key_RSHK, value_RSHK, visible(segments_RS, reach))
    if implementation == "packed":
        from arcticjax.models import packed_attention  # as splash, below

        return packed_attention.attend(query_RSHK, key_RSHK, value_RSHK, segments_RS, reach)
    scaled_RSHK = query_RSHK * jnp.asarray(query_RSHK.shape[-1] ** -0.5, value_RSHK.dtype)
    if implementation == "splash":
        if reach is not None:
            raise errors.ConfigError(f"train.attention: splash cannot be used: {SPLASH_NO_WINDOW}")
        from arcticjax.models import splash  # Pallas takes seconds to import

        mixed_RSHK = splash.attend(scaled_RSHK, key_RSHK, value_RSHK, segments_RS)
        return checkpoint_name(mixed_RSHK, looped.MIXED)
    # A head's tokens side by side: a CPU multiplies strided matrices at half the speed. Elsewhere
    # the compiler chooses layouts itself.
    scaled_RHSK, key_RHTK, value_RHTK = (
        jnp.swapaxes(one, 1, 2) for one in (scaled_RSHK, key_RSHK, value_RSHK)
    )
    if implementation == "looped":
        reach = jnp.int32(segments_RS.shape[1]) if reach is None else reach
        mixed_RHSK = looped.attend(scaled_RHSK, key_RHTK, value_RHTK, segments_RS, reach)
    else:
        mixed_RHSK = _xla(scaled_RHSK, key_RHTK, value_RHTK, visible(segments_RS, reach))
        mixed_RHSK = checkpoint_name(mixed_RHSK, looped.MIXED)
    return jnp.swapaxes(mixed_RHSK, 1, 2)


def is_fused_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """A rematerialisation policy: keeps what cuDNN's forward pass gives, which cannot be named from
    outside."""
    return primitive.name.startswith("dot_product_attention_fwd")


def visible(
    segments_RS: Int[Array, "R S"], reach: Int[Array, ""] | None = None
) -> Bool[Array, "R 1 S S"]:
    """True where a place of a row sees another: in its own segment, up to `reach` places away; at
    least itself."""
    same_R1ST = (segments_RS[:, :, None] == segments_RS[:, None, :])[:, None]
    if reach is None:
        return same_R1ST
    places_S = jnp.arange(segments_RS.shape[1], dtype=jnp.int32)
    near_ST = jnp.abs(places_S[:, None] - places_S[None, :]) <= reach
    return same_R1ST & near_ST[None, None]


def _cudnn(query_RSHK: Array, key_RSHK: Array, value_RSHK: Array, visible_R1ST: Array) -> Array:
    try:
        return jax.nn.dot_product_attention(
            query_RSHK,
            key_RSHK,
            value_RSHK,
            mask=visible_R1ST,
            implementation="cudnn",
        )
    except (NotImplementedError, RuntimeError) as problem:
        raise errors.ConfigError(
            f"train.attention: cudnn cannot run here: {problem} Set train.attention to xla"
        ) from problem


def _xla(scaled_RHSK: Array, key_RHTK: Array, value_RHTK: Array, visible_R1ST: Array) -> Array:
    dtype = value_RHTK.dtype
    scores_RHST = _products(scaled_RHSK, key_RHTK)
    scores_RHST = jnp.where(visible_R1ST, scores_RHST, MASKED)
    highest_RHS1 = jax.lax.stop_gradient(scores_RHST.max(axis=-1, keepdims=True))
    weights_RHST = jnp.exp(scores_RHST - highest_RHS1)
    # Dividing after the product keeps one array of RHST less for the backward pass.
    mixed_RHSK = jnp.matmul(
        weights_RHST.astype(dtype), value_RHTK, precision=matmul_precision(dtype)
    )
    mixed_RHSK = mixed_RHSK.astype(jnp.float32) / weights_RHST.sum(axis=-1, keepdims=True)
    return mixed_RHSK.astype(dtype)


@jax.custom_vjp
def _products(query_RHSK: Array, key_RHTK: Array) -> Array:
    """Products of queries with keys in float32, [R, H, S, T].

    Autodiff would multiply their float32 gradient as float32, whatever the dtype of the inputs.
    """
    return jnp.einsum(
        "RHSK,RHTK->RHST",
        query_RHSK,
        key_RHTK,
        precision=matmul_precision(query_RHSK.dtype),
        preferred_element_type=jnp.float32,
    )


def _products_forward(query_RHSK: Array, key_RHTK: Array) -> tuple[Array, tuple[Array, Array]]:
    return _products(query_RHSK, key_RHTK), (query_RHSK, key_RHTK)


def _products_backward(kept: tuple[Array, Array], gradient_RHST: Array) -> tuple[Array, Array]:
    query_RHSK, key_RHTK = kept
    precision = matmul_precision(query_RHSK.dtype)
    gradient_RHST = gradient_RHST.astype(query_RHSK.dtype)
    return (
        jnp.einsum("RHST,RHTK->RHSK", gradient_RHST, key_RHTK, precision=precision),
        jnp.einsum("RHST,RHSK->RHTK", gradient_RHST, query_RHSK, precision=precision),
    )


_products.defvjp(_products_forward, _products_backward)
