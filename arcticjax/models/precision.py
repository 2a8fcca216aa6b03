"""What matrix products and masked scores are computed in."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Finite, so that no row of scores can become NaN; exp of it is 0 beside any real score.
MASKED = -1e30


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """The precision that makes a matmul of this dtype what its name says: accelerators otherwise
    multiply float32 as TF32 or bfloat16."""
    if dtype == jnp.float32:
        return jax.lax.Precision.HIGHEST
    return jax.lax.Precision.DEFAULT
