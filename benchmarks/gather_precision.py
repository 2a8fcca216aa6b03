"""What does it cost to gather embeddings as bfloat16? Loss, gradient and rank 1 against float32.

python -m benchmarks.gather_precision --json OUT

Random embeddings with the cosines of a trained model: texts share a direction, numbers have
unequal weight, and pairs are from easy to hard. A gather in bfloat16 rounds documents on the way
out and their gradient on the way back; "both" rounds queries too and multiplies in bfloat16, as
`tiled_infonce` does with bfloat16 inputs. Errors are relative to float32; the gradient's is of the
queries (q) and of the documents (d). "rank 1" is the share of queries whose best document changes.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from arcticjax.losses import Labels, tiled_infonce

KINDS = ("documents", "documents and gradient", "both")
DEVICES = 8  # that share the gradient of a document; each rounds its part before the sum


def texts(seed: int, batch: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Queries and documents, unit length, float32.

    `main` prints the cosines that come of it: pairs overlap with the hardest of the others.
    """
    rng = np.random.default_rng(seed)
    scales = (1 + np.arange(width)) ** -0.25  # a decaying spectrum: fewer directions count

    def normalise(array: np.ndarray) -> np.ndarray:
        return array / np.linalg.norm(array, axis=1, keepdims=True)

    topics = normalise(rng.normal(size=(batch // 16, width)) * scales)
    topic_B = rng.integers(0, len(topics), batch)
    shared = normalise(rng.normal(size=(1, width)))
    own = 0.45 * topics[topic_B] + 0.9 * normalise(rng.normal(size=(batch, width)) * scales)
    queries = normalise(own)
    closeness = rng.uniform(0.0, 0.7, size=(batch, 1))
    noise = 0.45 * topics[topic_B] + 0.9 * normalise(rng.normal(size=(batch, width)) * scales)
    documents = closeness * queries + np.sqrt(1 - closeness**2) * normalise(noise)
    documents = normalise(documents)
    rotation = np.linalg.qr(rng.normal(size=(width, width)))[0]
    queries, documents = (
        normalise((part + 0.6 * shared) @ rotation) for part in (queries, documents)
    )
    return jnp.asarray(queries, jnp.float32), jnp.asarray(documents, jnp.float32)


@partial(jax.jit, static_argnames="dtype")
def loss_and_gradient(queries, documents, temperature, dtype=jnp.float32):
    """Mean loss, and its gradients by queries and by documents."""
    count = len(queries)
    rows = jnp.arange(count, dtype=jnp.int32)

    def mean(queries, documents):
        sums = tiled_infonce(
            queries.astype(dtype),
            documents.astype(dtype),
            Labels(rows[:, None], rows, rows),
            temperature=temperature,
            tile=1024,
        )
        return sums.loss / sums.count

    return jax.value_and_grad(mean, argnums=(0, 1))(queries, documents)


def rounded(array: jax.Array) -> jax.Array:
    return array.astype(jnp.bfloat16).astype(jnp.float32)


@jax.jit
def rounded_sum(parts: list[jax.Array]) -> jax.Array:
    """A reduce-scatter in bfloat16: parts are rounded, and so is every sum on the way."""
    total = rounded(parts[0])
    for part in parts[1:]:
        total = rounded(total + rounded(part))
    return total


@jax.jit
def best(queries: jax.Array, documents: jax.Array) -> jax.Array:
    """Place of the nearest document of each query."""
    chunks = queries.reshape(-1, 256, queries.shape[1])
    multiply = partial(jnp.matmul, precision="highest")
    return jax.lax.map(lambda some: multiply(some, documents.T).argmax(axis=1), chunks).reshape(-1)


def document_gradient_in_parts(queries, documents, temperature) -> jax.Array:
    """The documents' gradient as devices give it, each from its own queries."""
    count, b = len(queries), len(queries) // DEVICES
    groups = jnp.arange(count, dtype=jnp.int32)

    @jax.jit
    def part(some, rows):
        def mean(documents):
            sums = tiled_infonce(
                some,
                documents,
                Labels(rows[:, None], rows, groups),
                temperature=temperature,
                tile=1024,
            )
            return sums.loss / count

        return jax.grad(mean)(documents)

    return rounded_sum(
        [
            part(queries[start : start + b], groups[start : start + b])
            for start in range(0, count, b)
        ]
    )


def distance(found: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def measure(batch: int, width: int, temperature: float, seed: int) -> list[dict]:
    """A row for each kind of rounding."""
    queries, documents = texts(seed, batch, width)
    loss, exact = loss_and_gradient(queries, documents, temperature)
    nearest = best(queries, documents)
    rows = []
    for kind in KINDS:
        queries_in = rounded(queries) if kind == "both" else queries
        dtype = jnp.bfloat16 if kind == "both" else jnp.float32
        found, (of_queries, of_documents) = loss_and_gradient(
            queries_in, rounded(documents), temperature, dtype=dtype
        )
        if kind == "documents and gradient":
            of_documents = document_gradient_in_parts(queries, rounded(documents), temperature)
        rows.append(
            {
                "batch": batch,
                "width": width,
                "temperature": temperature,
                "rounded": kind,
                "loss": float(loss),
                "loss_change": float(found - loss) / float(loss),
                "gradient_error_queries": distance(of_queries, exact[0]),
                "gradient_error_documents": distance(of_documents, exact[1]),
                "rank_1": float(jnp.mean(nearest == jnp.arange(batch))),
                "rank_1_changed": float(jnp.mean(best(queries_in, rounded(documents)) != nearest)),
            }
        )
    return rows


def describe(batch: int, width: int, seed: int) -> str:
    """The cosines that are measured on."""
    queries, documents = texts(seed, batch, width)
    cosines = np.asarray(jnp.matmul(queries, documents.T, precision="highest"))
    pairs = cosines.diagonal()
    others = cosines[~np.eye(batch, dtype=bool)].reshape(batch, -1)
    return (
        f"D = {width}: cosines of pairs {pairs.mean():.2f} (standard deviation {pairs.std():.2f}), "
        f"of others {others.mean():.2f} ({others.std():.2f}), "
        f"hardest of {batch - 1} others {others.max(axis=1).mean():.2f}"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 2048, 8192])
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.01, 0.02, 0.05])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    for width in options.widths:
        print(describe(min(options.batches), width, options.seed))
    print("    B    D  temp.  rounded                     loss   change   grad q   grad d   rank 1")
    rows = []
    for width in options.widths:
        for batch in options.batches:
            for temperature in options.temperatures:
                for row in measure(batch, width, temperature, options.seed):
                    rows.append(row)
                    print(
                        f"{batch:5} {width:4} {temperature:6} "
                        f" {row['rounded']:23} {row['loss']:8.4f} {row['loss_change']:+8.1e} "
                        f"{row['gradient_error_queries']:8.1e} "
                        f"{row['gradient_error_documents']:8.1e} {row['rank_1_changed']:8.2%}",
                        flush=True,
                    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
