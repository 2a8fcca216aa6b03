"""What this device reaches in one large matrix product: the ceiling for everything else.

python -m benchmarks.ceiling [--size 8192] [--dtype bfloat16] [--json OUT]

Random numbers: products of zeros draw less power and run faster than any real work.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import measuring

CHAIN = 8  # products between two looks at the clock, so that starting them does not count


def main() -> None:
    """Prints the median TFLOP/s."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path, help="also write the row here")
    options = parser.parse_args()
    size = options.size
    left, right = (
        jax.random.normal(key, (size, size), jnp.dtype(options.dtype)) * size**-0.5
        for key in jax.random.split(jax.random.key(0))
    )

    multiply = jax.jit(jnp.matmul)

    def products() -> jax.Array:
        product = left
        for _ in range(CHAIN):
            product = multiply(product, right)
        return jax.block_until_ready(product)

    samples = measuring.interleave({"product": products}, options.repeats, warm=2)
    rate = CHAIN * 2 * size**3 / samples["product"].median("wall") / 1e12
    device = jax.devices()[0].device_kind
    row = {"device": device, "size": size, "dtype": options.dtype, "TFLOP/s": rate}
    print(measuring.table([row], {"device": "", "size": "", "dtype": "", "TFLOP/s": ".3g"}))
    measuring.write_json(options.json, [row])


if __name__ == "__main__":
    main()
