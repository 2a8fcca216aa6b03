"""InfoNCE alone, forward and backward: time, memory and exactness, against what others do.

python -m benchmarks.loss --json OUT

Sides: `tiled` (arcticjax), `jax naive` (the whole score matrix), `torch naive` (cross entropy of
it), and sentence-transformers' own losses, `mnrl` (MultipleNegativesRankingLoss) and `cached mnrl`
(its Cached form, scores in chunks of its default 32 rows). All compute the same mean loss of B
pairs from the same float32 embeddings (--dtype bfloat16 rounds them) and both gradients.

Three tables:
- time at the batches up to --timed, sides in turn, and the median ratio of each side to `tiled`;
- memory: temporaries by the compiler (JAX; at every batch, nothing runs), and the growth over one
  call of the resident set of a process of its own, to --timed (on a GPU: torch's growth of what is
  allocated there; JAX allocates the temporaries that the compiler states);
- relative error of the gradient against float64, in an ordinary regime and where pairs are well
  separated (loss of 1e-6 and less).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measuring

ERROR_BATCH = 512
# (cosine of a pair, temperature); the second gives a loss of 1e-6 and less.
REGIMES = {"ordinary": (0.3, 0.05), "saturated": (0.47, 0.02)}
SIDES = ("tiled", "jax naive", "torch naive", "mnrl", "cached mnrl")
OF_TORCH = SIDES[2:]

Gradients = tuple[float, np.ndarray, np.ndarray]


def embeddings(
    batch: int, width: int, closeness: float = 0.3, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Queries and documents of unit length, float32; a pair's cosine is about `closeness`."""
    rng = np.random.default_rng(seed)

    def normalise(array: np.ndarray) -> np.ndarray:
        return array / np.linalg.norm(array, axis=1, keepdims=True)

    queries, noise = (normalise(rng.standard_normal((batch, width))) for _ in range(2))
    documents = normalise(closeness * queries + np.sqrt(1 - closeness**2) * noise)
    return queries.astype(np.float32), documents.astype(np.float32)


def exact(queries: np.ndarray, documents: np.ndarray, temperature: float) -> Gradients:
    """Loss and gradients in float64, with the positive's weight as minus the sum of the others."""
    queries, documents = queries.astype(np.float64), documents.astype(np.float64)
    scores = queries @ documents.T / temperature
    positive = scores.diagonal().copy()
    np.fill_diagonal(scores, -np.inf)
    weights = np.exp(scores - np.maximum(scores.max(axis=1), positive)[:, None])
    total = weights.sum(axis=1) + np.exp(positive - np.maximum(scores.max(axis=1), positive))
    weights /= total[:, None]
    others = weights.sum(axis=1)
    np.fill_diagonal(weights, -others)
    weights /= len(queries) * temperature
    loss = -np.log1p(-others).mean()
    return float(loss), weights @ documents, weights.T @ queries


def relative_error(found: Gradients, expected: Gradients) -> float:
    """Distance of the gradients over their norm, of queries or of documents: the larger."""
    return max(
        float(np.linalg.norm(one.astype(np.float64) - other) / np.linalg.norm(other))
        for one, other in zip(found[1:], expected[1:], strict=True)
    )


@functools.cache
def jax_program(side: str, batch: int, width: int, temperature: float, dtype: str) -> Any:
    """The compiled loss and gradients by queries and documents; nothing has run."""
    import jax
    import jax.numpy as jnp

    from arcticjax.losses import Labels, tiled_infonce
    from arcticjax.step import program

    tile = program.usual_tile(jax.default_backend())

    def tiled(queries_BD: jax.Array, documents_BD: jax.Array) -> jax.Array:
        rows_B = jnp.arange(batch, dtype=jnp.int32)
        labels = Labels(rows_B[:, None], rows_B, rows_B)
        sums = tiled_infonce(queries_BD, documents_BD, labels, temperature=temperature, tile=tile)
        return sums.loss / sums.count

    def naive(queries_BD: jax.Array, documents_BD: jax.Array) -> jax.Array:
        precision = "highest" if dtype == "float32" else None
        scores_BB = jnp.matmul(
            queries_BD, documents_BD.T, precision=precision, preferred_element_type=jnp.float32
        )
        scores_BB = scores_BB / temperature
        return jnp.mean(jax.nn.logsumexp(scores_BB, axis=1) - jnp.diagonal(scores_BB))

    function = {"tiled": tiled, "jax naive": naive}[side]
    texts = jax.ShapeDtypeStruct((batch, width), dtype)
    return jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(texts, texts).compile()


def prepared(
    side: str,
    queries: np.ndarray,
    documents: np.ndarray,
    temperature: float,
    dtype: str,
    gpu: bool = False,
) -> tuple[Callable[[], Any], Callable[[Any], Gradients]]:
    """(a call that computes the side and waits for it, its result as NumPy arrays)."""
    prepare = _prepared_torch if side in OF_TORCH else _prepared_jax
    return prepare(side, queries, documents, temperature, dtype, gpu)


def _prepared_jax(
    side: str,
    queries: np.ndarray,
    documents: np.ndarray,
    temperature: float,
    dtype: str,
    gpu: bool,
) -> tuple[Callable[[], Any], Callable[[Any], Gradients]]:
    import jax
    import jax.numpy as jnp

    batch, width = queries.shape
    program = jax_program(side, batch, width, temperature, dtype)
    given = jnp.asarray(queries, dtype), jnp.asarray(documents, dtype)

    def read(found: Any) -> Gradients:
        loss, gradients = found
        of_queries, of_documents = (np.asarray(one.astype(jnp.float32)) for one in gradients)
        return float(loss), of_queries, of_documents

    return lambda: jax.block_until_ready(program(*given)), read


def _prepared_torch(
    side: str,
    queries: np.ndarray,
    documents: np.ndarray,
    temperature: float,
    dtype: str,
    gpu: bool,
) -> tuple[Callable[[], Any], Callable[[Any], Gradients]]:
    import torch

    device = "cuda" if gpu else "cpu"
    given = [
        torch.tensor(array, dtype=getattr(torch, dtype), device=device, requires_grad=True)
        for array in (queries, documents)
    ]
    value_and_backward = _torch_loss(side, temperature)

    def call() -> tuple[Any, Any, Any]:
        for one in given:
            one.grad = None
        loss = value_and_backward(*given)
        if gpu:
            torch.cuda.synchronize()
        return loss, given[0].grad, given[1].grad

    def read(found: tuple[Any, Any, Any]) -> Gradients:
        loss, of_queries, of_documents = found
        return float(loss), of_queries.float().cpu().numpy(), of_documents.float().cpu().numpy()

    return call, read


def _torch_loss(side: str, temperature: float) -> Callable[[Any, Any], Any]:
    """A function of queries and documents that runs the backward pass and returns the loss."""
    import torch

    if side == "torch naive":
        targets = {}

        def naive(queries: Any, documents: Any) -> Any:
            count = len(queries)
            if count not in targets:
                targets[count] = torch.arange(count, device=queries.device)
            scores = (queries @ documents.T).float() / temperature
            loss = torch.nn.functional.cross_entropy(scores, targets[count])
            loss.backward()
            return loss.detach()

        return naive
    from sentence_transformers import util
    from sentence_transformers.sentence_transformer import losses

    # The embeddings have unit length: the dot product is their cosine.
    settings: dict[str, Any] = {"scale": 1 / temperature, "similarity_fct": util.dot_score}
    no_model: Any = torch.nn.Sequential(torch.nn.Identity())  # embeddings are given
    if side == "mnrl":
        whole = losses.MultipleNegativesRankingLoss(no_model, **settings)

        def plain(queries: Any, documents: Any) -> Any:
            labels: Any = None
            loss = whole.compute_loss_from_embeddings([queries, documents], labels)
            loss.backward()
            return loss.detach()

        return plain
    chunked = losses.CachedMultipleNegativesRankingLoss(no_model, **settings)
    return lambda queries, documents: chunked.calculate_loss(
        [[queries], [documents]], with_backward=True
    )


def error_rows(width: int, sides: tuple[str, ...], dtype: str, gpu: bool) -> list[dict]:
    """Gradient errors of every side in both regimes."""
    rows = []
    for regime, (closeness, temperature) in REGIMES.items():
        texts = embeddings(ERROR_BATCH, width, closeness)
        expected = exact(*_as_given(texts, dtype), temperature)
        for side in sides:
            call, read = prepared(side, *texts, temperature, dtype, gpu)
            found = read(call())
            rows.append(
                {
                    "regime": regime,
                    "width": width,
                    "side": side,
                    "loss": expected[0],
                    "gradient_error": relative_error(found, expected),
                }
            )
    return rows


def _as_given(texts: tuple[np.ndarray, np.ndarray], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The numbers that a side sees: rounded, where the dtype is narrower."""
    import jax.numpy as jnp

    queries, documents = (np.asarray(jnp.asarray(one, dtype).astype(jnp.float32)) for one in texts)
    return queries, documents


def time_rows(
    batch: int, width: int, sides: tuple[str, ...], repeats: int, dtype: str, gpu: bool
) -> list[dict]:
    """Median seconds of every side, and how much longer it takes than `tiled`."""
    texts = embeddings(batch, width)
    pairs = {side: prepared(side, *texts, 0.05, dtype, gpu) for side in sides}
    found = measuring.interleave({side: call for side, (call, _) in pairs.items()}, repeats)
    values = {side: pairs[side][1](found[side].value) for side in sides}
    return [
        {
            "batch": batch,
            "width": width,
            "side": side,
            "cpu_seconds": samples.median("cpu"),
            "wall_seconds": samples.median("wall"),
            "times_tiled_cpu": measuring.ratio(found, side, "tiled", "cpu"),
            "times_tiled_wall": measuring.ratio(found, side, "tiled", "wall"),
            "loss": values[side][0],
            "from_tiled": relative_error(values[side], values["tiled"]),
        }
        for side, samples in found.items()
    ]


def memory_rows(
    batch: int, width: int, sides: tuple[str, ...], dtype: str, runs: bool, gpu: bool
) -> list[dict]:
    """Temporaries by the compiler and, where it `runs`, what one call takes of real memory."""
    rows = []
    for side in sides:
        row: dict[str, Any] = {"batch": batch, "width": width, "side": side}
        if side not in OF_TORCH:
            analysis = jax_program(side, batch, width, 0.05, dtype).memory_analysis()
            row["temporaries_mib"] = analysis.temp_size_in_bytes / 2**20
        if runs and gpu and side in OF_TORCH:
            row["growth_mib"] = _growth_on_gpu(side, batch, width, dtype)
        elif runs and not gpu:
            arguments = ["--one", side, "--batches", str(batch), "--widths", str(width)]
            row |= measuring.in_own_process("benchmarks.loss", [*arguments, "--dtype", dtype])
        if len(row) > 3:
            rows.append(row)
    return rows


def growth(side: str, batch: int, width: int, dtype: str) -> dict[str, float]:
    """MiB that one call adds to this process at most."""
    # Libraries take their workspaces at a first, small call.
    prepared(side, *embeddings(64, width), 0.05, dtype)[0]()
    call, _ = prepared(side, *embeddings(batch, width), 0.05, dtype)
    measuring.forget_peak()
    before = measuring.resident()
    call()
    return {"growth_mib": (measuring.peak_resident() - before) / 2**20}


def _growth_on_gpu(side: str, batch: int, width: int, dtype: str) -> float:
    """MiB that one call of a torch side adds to what is allocated on the GPU."""
    import torch

    call, _ = prepared(side, *embeddings(batch, width), 0.05, dtype, gpu=True)
    call()  # its gradients stay
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1024, 4096, 8192, 16384, 32768], metavar="B"
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768], metavar="D")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, metavar="SIDE")
    parser.add_argument(
        "--timed", type=int, help="largest batch that runs (8192; on a GPU every batch)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1, help="threads of a side; 0: its own way")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is None:  # a process that this one started is pinned already
        measuring.pin(options.threads or None)
    # The two share a GPU: neither may take it all.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    gpu = _on_gpu()
    if options.one is not None:
        (batch,), (width,) = options.batches, options.widths
        print(json.dumps(growth(options.one, batch, width, options.dtype)))
        return
    sides = tuple(dict.fromkeys(["tiled", *options.sides]))
    largest = options.timed or (max(options.batches) if gpu else 8192)

    print(measuring.describe(measuring.machine()), flush=True)
    errors = [
        row for width in options.widths for row in error_rows(width, sides, options.dtype, gpu)
    ]
    print(f"\nGradient against float64, B = {ERROR_BATCH}, {options.dtype}")
    columns = {"regime": "", "width": "", "side": "", "loss": ".2e", "gradient_error": ".1e"}
    print(measuring.table(errors, columns), flush=True)

    memory, times = [], []
    for width in options.widths:
        for batch in options.batches:
            runs = batch <= largest
            memory += memory_rows(batch, width, sides, options.dtype, runs, gpu)
            if runs:
                times += time_rows(batch, width, sides, options.repeats, options.dtype, gpu)
    print("\nMemory: temporaries by the compiler, and growth of a process over one call, MiB")
    columns = {
        "batch": "",
        "width": "",
        "side": "",
        "temporaries_mib": ",.0f",
        "growth_mib": ",.0f",
    }
    print(measuring.table(memory, columns))
    print(f"\nTime, medians of {options.repeats} rounds in turn")
    columns = {
        "batch": "",
        "width": "",
        "side": "",
        "cpu_seconds": ".3f",
        "wall_seconds": ".4f",
        "times_tiled_cpu": ".2f",
        "times_tiled_wall": ".2f",
        "from_tiled": ".1e",
    }
    print(measuring.table(times, columns))
    measuring.write_json(options.json, [*errors, *memory, *times])


def _on_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"


if __name__ == "__main__":
    main()
