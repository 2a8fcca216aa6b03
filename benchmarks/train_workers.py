"""The two sides of `benchmarks.train_throughput`, each in a process of its own.

A worker reads one JSON object a line on stdin, {"start": S, "stop": E}: train on batches S to E-1;
it answers on stdout with the seconds that took and the loss of every step.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import measuring

Steps = Callable[[int, int], dict[str, Any]]


def main() -> None:
    """Runs the side that the job names until stdin ends."""
    job = json.loads(sys.argv[1])
    measuring.pin(job["threads"] or None)
    run = {"arcticjax": arcticjax_side, "torch": torch_side}[job["kind"]](job)
    for line in sys.stdin:
        asked = json.loads(line)
        began, used = time.monotonic(), time.process_time()
        found = run(asked["start"], asked["stop"])
        found.setdefault("wall", time.monotonic() - began)
        found.setdefault("cpu", time.process_time() - used)
        found.setdefault("peak_bytes", measuring.peak_resident())
        print("ANSWER " + json.dumps(found), flush=True)


def arcticjax_side(job: dict[str, Any]) -> Steps:
    """The program and the input pipeline of `arcticjax.train`, without its reports and saves."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if job["device"] == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"  # no look for other devices
    import jax

    from arcticjax.config import load_config
    from arcticjax.data import pipeline
    from arcticjax.parallel import mesh as meshes
    from arcticjax.plan import costs
    from arcticjax.step import activations
    from arcticjax.train import setup

    mesh = meshes.make_mesh(1)
    with jax.set_mesh(mesh):
        ready = setup.prepare(load_config(job["config"], job["sets"]), mesh)
        program = ready.program
        compiled = program.lower(
            program.abstract_state(), program.abstract_buffers(), program.abstract_batch()
        ).compile()

    def hosts(start: int, stop: int) -> Iterator[pipeline.HostBatch]:
        return pipeline.batches(ready.builder, start, stop, threads=1, prefetch=2)

    state, buffers = None, []

    def run(start: int, stop: int) -> dict[str, Any]:
        nonlocal state, buffers
        metrics, squares = [], 0.0
        if state is None and stop > start:  # not before it is this side's turn to use the device
            with jax.set_mesh(mesh):
                state, buffers = ready.initial_state(), activations.allocate(program.kept, mesh)
        batches = hosts(start, stop)
        if job["device"] == "gpu":  # the next batch is ready, as it is in the middle of a run
            batches = itertools.chain([next(batches)] if stop > start else [], batches)
        began = time.monotonic()
        for host in batches:
            batch = meshes.host_to_global(mesh, host.arrays)
            state, buffers, found = compiled(state, buffers, batch)
            metrics.append(found)
            squares += float((host.arrays["lengths"].astype(float) ** 2).sum())
            if len(metrics) > 1:  # as in the run: a step's numbers are read while the next runs
                jax.block_until_ready(metrics[-2])
        metrics = jax.device_get(metrics)
        spec, tokens = ready.start.spec, sum(float(one["tokens"]) for one in metrics)
        of_loss = len(metrics) * 6.0 * job["batch"] ** 2 * spec.hidden_size
        answer = {
            "losses": [float(one["loss"]) for one in metrics],
            "tokens": tokens,
            "slots": sum(float(one["tokens"] / one["fill"]) for one in metrics),
            "model_flops": 3 * costs.forward_flops(spec, tokens, squares) + of_loss,
            "announced": program.announcement(),
        }
        if job["device"] == "gpu":
            answer["wall"] = time.monotonic() - began
        statistics = mesh.devices.flat[0].memory_stats()
        if statistics:
            answer["peak_bytes"] = statistics["peak_bytes_in_use"]
        return answer

    return run


def torch_side(job: dict[str, Any]) -> Steps:
    """sentence-transformers' model and loss in a plain loop: no trainer, no data loader; dropout
    off, as on the other side.

    Texts are tokenised as they come. On a GPU, which would wait for that, it is done before the
    clock starts: a trainer can have it done elsewhere."""
    import pyarrow.parquet
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import losses as peer_losses
    from sentence_transformers.util import batch_to_device

    from arcticjax.data.draw import Draw

    torch.manual_seed(0)
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    device = "cuda" if job["device"] == "gpu" else "cpu"
    model = SentenceTransformer(job["model"], device=device)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    if job["cached"]:
        loss = peer_losses.CachedMultipleNegativesRankingLoss(
            model, scale=1 / job["temperature"], mini_batch_size=job["cached"]
        )
    else:
        loss = peer_losses.MultipleNegativesRankingLoss(model, scale=1 / job["temperature"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=job["learning_rate"], weight_decay=0.0, fused=True
    )
    table = pyarrow.parquet.read_table(Path(job["pairs"]))
    queries, documents = table["query"].to_pylist(), table["document"].to_pylist()
    draw = Draw([len(queries)], job["batch"], 0)

    def tokenized(texts: list[str], longest: int) -> dict[str, Any]:
        model.max_seq_length = longest
        return batch_to_device(model.preprocess(texts), device)

    def batch(step: int) -> list[dict[str, Any]]:
        records = draw.at(step).records.tolist()
        return [
            tokenized([queries[record] for record in records], job["query_length"]),
            tokenized([documents[record] for record in records], job["document_length"]),
        ]

    def run(start: int, stop: int) -> dict[str, Any]:
        found, tokens, slots = [], 0, 0
        steps = range(start, stop)
        batches = [batch(step) for step in steps] if device == "cuda" else map(batch, steps)
        began, used = time.monotonic(), time.process_time()
        for sides in batches:
            with torch.autocast(device, torch.bfloat16, enabled=job["precision"] == "bfloat16"):
                value = loss(sides, None)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(value.detach())
            tokens += sum(side["attention_mask"].sum() for side in sides)
            slots += sum(side["input_ids"].numel() for side in sides)
        losses = [float(one) for one in found]
        answer = {
            "losses": losses,
            "tokens": int(tokens),
            "slots": slots,
            "wall": time.monotonic() - began,
            "cpu": time.process_time() - used,
        }
        if device == "cuda":
            answer["peak_bytes"] = torch.cuda.max_memory_allocated()
        return answer

    return run


if __name__ == "__main__":
    main()
