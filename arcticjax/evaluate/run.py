"""One evaluation: open the encoder, say how long it takes, score task by task, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from arcticjax.config.contract import TextContract
from arcticjax.errors import ConfigError
from arcticjax.evaluate import progress, records, report, tasks
from arcticjax.export.scores import fingerprints
from arcticjax.export.source import make_embedder, open_source
from arcticjax.models.spec import ModelSpec, Pooling
from arcticjax.parallel import distributed
from arcticjax.parallel.peers import Peers
from arcticjax.parallel.stop import StopSignal
from arcticjax.scoring import benchmarks
from arcticjax.scoring.compression import FULL, Compression
from arcticjax.step.embedder import Embedder


@dataclass(frozen=True)
class Request:
    """What the command line asks for. made: tasks that a run made itself, by name. length: cut of
    both sides in tokens; None: see `cut`. compressions: beside the whole vectors. peer_seconds: see
    `Peers`."""

    model: str
    tasks: Sequence[str]
    output: Path
    step: int | None = None
    pooling: Pooling | None = None
    made: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    length: int | None = None
    compressions: Sequence[str] = ()
    precision: str = "float32"
    peer_seconds: float = 60.0


def run(request: Request, mesh: Mesh) -> None:
    """Evaluates and writes the report; on process 0 of several, which all make the same calls.

    SIGTERM ends it with Preempted: at once, or, of several processes, after the task under way.
    """
    wanted = tasks.wanted(request.tasks, request.made)
    compressions = list(
        dict.fromkeys([FULL, *(Compression.parse(one) for one in request.compressions)])
    )
    source = open_source(request.model, step=request.step, pooling=request.pooling)
    source = dataclasses.replace(source, contract=cut(source.contract, source.spec, request))
    for one in compressions:
        if one.dimension is not None and one.dimension > source.spec.hidden_size:
            raise ConfigError(
                f"--compress {one}: the model's vectors have {source.spec.hidden_size} dimensions"
            )
    embedder = make_embedder(source, mesh, dtype=jnp.dtype(request.precision))
    revision = embedder.fingerprint()
    about = report.About(
        source.origin,
        revision,
        embedder.dimension,
        compressions,
        _facts(source.contract, embedder),
        {**fingerprints(source), "dimension": embedder.dimension, "precision": request.precision},
        {one.name: one.dataset for one in wanted if one.dataset is not None},
        source.spec.parameter_count(),
        source.contract.document_length,
    )
    identities = {
        one.name: records.Identity(one.name, revision, one.data, [str(c) for c in compressions])
        for one in wanted
    }
    finished = {
        name: record
        for name, identity in identities.items()
        if (record := records.read(request.output, identity)) is not None
    }
    talk = distributed.talks()
    found = dict(finished)

    def scored() -> str:
        return (
            f"{request.output} holds {len(found)} of {len(wanted)} tasks; the same command goes on "
            "with the next"
        )

    with (
        StopSignal(scored) as stop,
        Peers(request.peer_seconds, request.output),
        jax.set_mesh(mesh),
    ):
        if talk:
            records.prepare(request.output)
        pending = [one for one in wanted if one.name not in finished]
        shown = _announce(about, pending, finished, embedder, source.contract, talk)
        for one in pending:
            size = one.size(source.contract.document_length)
            shown.begin(one.name, size and size[0])
            record = tasks.score(
                one,
                embedder,
                identities[one.name],
                compressions,
                shown.encoded,
                _Keep(request, talk),
            )
            if talk:
                records.write(request.output, record)
            found[one.name] = record
            value = record.metrics.get("ndcg_at_10", record.metrics.get("main_score", 0.0))
            kind = "nDCG@10" if "ndcg_at_10" in record.metrics else "main score"
            shown.finish(f"{kind} {value:.4f} in {progress.seconds(record.seconds)}")
            stop.look()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("arcticjax evaluation done")
    if talk:
        summary = report.write(request.output, about, [found[one.name] for one in wanted])
        for table in report.make_tables(about, summary, None):
            print(f"\n{table.title}\n{report.to_text(table)}")
        print(f"\nreport  {request.output / 'report.html'}")


def cut(contract: TextContract, spec: ModelSpec, request: Request) -> TextContract:
    """The contract with both sides cut at one length, as in the exported folder: the one asked for,
    the published protocol's for its own benchmark, else the longer of the model's two."""
    length = request.length
    if length is None:
        length = max(contract.query_length, contract.document_length)
        if benchmarks.RETRIEVAL_15_NAME in request.tasks:
            length = min(benchmarks.PUBLISHED_LENGTH, spec.max_positions)
    if length > spec.max_positions:
        raise ConfigError(
            f"--length {length}: the model has positions for {spec.max_positions} tokens"
        )
    return dataclasses.replace(contract, query_length=length, document_length=length)


def _announce(
    about: report.About,
    pending: Sequence[tasks.Wanted],
    finished: Mapping[str, Any],
    embedder: Embedder,
    contract: TextContract,
    talk: bool,
) -> progress.Progress:
    """Says what is to be done and how long it will take, by a measurement."""
    sizes = {one.name: one.size(contract.document_length) for one in pending}
    rate = progress.measure(embedder) if pending else 1.0
    works = {name: size and size[1] for name, size in sizes.items()}
    shown = progress.Progress(works, rate, talk=talk)
    shown.say(f"model   {about.model}, revision {about.revision[:12]}")
    for what, value in about.facts:
        shown.say(f"{what:<7} {value}")
    if finished:
        shown.say(f"resumes {len(finished)} finished: {', '.join(finished)}")
    if pending:
        known = [size[0] for size in sizes.values() if size]
        texts = [f"{sum(known):,} texts"] if known else []
        if len(known) < len(sizes):
            texts.append("those of tasks of unknown size")
        devices = embedder.shapes()["devices"]
        shown.say(
            f"takes   {shown.estimate()} for {len(pending)} "
            f"task{'s' if len(pending) > 1 else ''}, {' and '.join(texts)}, at {rate:,.0f} "
            f"characters/s measured on {devices} device{'s' if devices > 1 else ''}; loading, "
            "compiling and searching come on top and are counted from the first texts on"
        )
    return shown


def _facts(contract: TextContract, embedder: Embedder) -> list[tuple[str, str]]:
    return [
        ("prompts", f"query {contract.query_prompt!r}, document {contract.document_prompt!r}"),
        (
            "vectors",
            f"{contract.pooling} pooling, {embedder.dimension} dimensions, texts cut at "
            f"{contract.document_length} tokens, {jnp.dtype(embedder.dtype).name}",
        ),
    ]


class _Keep:
    """Files MTEB's own result beside ours, in the layout that its tools and leaderboard read."""

    def __init__(self, request: Request, talk: bool) -> None:
        self._folder = request.output / "mteb"
        self._talk = talk

    def __call__(self, result: Any, meta: Any) -> None:
        if self._talk:
            from mteb.cache import ResultCache

            ResultCache(self._folder).save_to_cache(result, meta)
