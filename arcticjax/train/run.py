"""A training run from start to finish.

Claim the directory, prepare, resume or begin, train, evaluate, export.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from arcticjax import errors
from arcticjax.checkpoint import identity
from arcticjax.checkpoint.agreement import everywhere, from_primary
from arcticjax.checkpoint.bucket_steps import open_steps
from arcticjax.checkpoint.run_directory import RunDirectory
from arcticjax.checkpoint.store import CheckpointStore
from arcticjax.config import RunConfig, differences, dump_config, load_config
from arcticjax.export import certificate, record
from arcticjax.parallel import compilation_cache, distributed
from arcticjax.parallel import mesh as meshes
from arcticjax.parallel.peers import Peers
from arcticjax.parallel.stop import StopSignal
from arcticjax.parallel.watchdog import Watchdog
from arcticjax.step import activations
from arcticjax.step import state as states
from arcticjax.train import alike, result, setup
from arcticjax.train.json_lines import REJECTED_SUFFIX, write_atomically
from arcticjax.train.loop import Loop, Totals
from arcticjax.train.report import EVALUATIONS_FILE, LOG_FILE, METRICS_FILE, Report
from arcticjax.train.timeline import GOODPUT_FILE, Timeline

# Fields that may change when a run resumes: they do not change what is learned.
_FREE = (
    "run.directory",
    "run.compilation_cache",
    "data.cache",
    "data.threads",
    "data.prefetch",
    "train.log_every_steps",
    "mesh",
    "checkpoint",
    "evaluation",
    "export",
    "report",
    "loss.tile",
    "train.microbatch",
    "train.passes",
    "train.ladder",
    "train.remat",
    "train.attention",
    "train.nonfinite",
    "train.nonfinite_limit",
)
# What a run that resumes reads or goes on writing.
_CONTINUED = (
    "config.yaml",
    identity.IDENTITY_FILE,
    GOODPUT_FILE,
    result.RESULT_FILE,
    LOG_FILE,
    *(name + end for name in (METRICS_FILE, EVALUATIONS_FILE) for end in ("", REJECTED_SUFFIX)),
)
# What a source says of itself only for the card.
_STATED = re.compile(r"data\.sources\.\d+\.(licence|language)(\..*)?")


def run(config: RunConfig) -> result.Result:
    """Trains as `config` says and returns what `result.json` holds.

    A run that was stopped goes on from its last good checkpoint; a finished one is only reported.
    Raises an ArcticError, whose exit codes are part of the command line's contract. SIGTERM is one
    of them, Preempted.
    """
    began, timeline = time.monotonic(), Timeline()
    RunDirectory(config.run.directory)  # refuses what cannot be one
    with (
        StopSignal(lambda: _saved(RunDirectory(config.run.directory))) as stop,
        contextlib.ExitStack() as stack,
    ):
        distributed.start(config.mesh.platform, config.mesh.policy)
        compilation_cache.keep_compiled(config.run.compilation_cache)
        alike.check_start(config)
        directory = RunDirectory(config.run.directory)
        check_lease = _claim(directory, stack)
        stack.enter_context(Peers(config.mesh.peer_seconds, Path(directory.path)))
        _begin(config, directory)
        finished = _finished(directory)
        if finished is not None:
            return finished
        if distributed.talks():
            stack.enter_context(directory.mirrored(check_lease, last=result.RESULT_FILE))
        mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.slices)
        stack.enter_context(jax.set_mesh(mesh))
        # Closed before the claim is given up: a save under way must not outlive it.
        store = stack.enter_context(
            CheckpointStore(
                directory.checkpoints,
                config.checkpoint.keep,
                directory.checkpoint_bucket,
                before=directory.publish,  # metrics up to the step, which a run that resumes keeps
            )
        )
        return _train(config, mesh, directory, store, check_lease, stop, began, timeline)


def _saved(directory: RunDirectory) -> str:
    """What a run that is stopped now would go on from."""
    try:
        steps = open_steps(directory.checkpoints, directory.checkpoint_bucket).with_manifest()
    except errors.StoreError as error:
        return f"the same command goes on from what is saved, which cannot be told now: {error}"
    if not steps:
        return f"{directory.place} holds no checkpoint yet; the same command begins at step 0"
    found = f"{directory.place} holds a checkpoint of step {steps[-1]}"
    return f"{found}; the same command resumes from it"


def _claim(directory: RunDirectory, stack: contextlib.ExitStack) -> Callable[[], None]:
    """Claims the directory for the run, on process 0; all processes fail if that fails.

    Returns a check that the claim still stands, for process 0.
    """
    checks: list[Callable[[], None]] = []
    from_primary(lambda: checks.append(stack.enter_context(directory.claim()).check))
    return checks[0] if checks else lambda: None


def _begin(config: RunConfig, directory: RunDirectory) -> None:
    """Looks at what there is of the run; what is in a bucket, every process brings for itself."""

    def begin() -> None:
        directory.bring(_CONTINUED)
        _check_unchanged(config, directory)

    begin() if directory.bucket is None else everywhere(begin)


def _train(
    config: RunConfig,
    mesh: Mesh,
    run_directory: RunDirectory,
    store: CheckpointStore,
    check_lease: Callable[[], None],
    stop: StopSignal,
    began: float,
    timeline: Timeline,
) -> result.Result:
    timeline.enter("prepare")
    ready = setup.prepare(config, mesh)
    alike.check_prepared(ready)
    stop.look()
    directory = Path(run_directory.path)
    timeline.enter("restore")
    state = ready.initial_state()
    restored = store.restore(states.abstract(state))
    start, totals = 0, Totals()
    if restored is not None:
        _check_data(restored.meta, ready.meta(), run_directory.place)
        state, start = restored.state, restored.step
        totals = Totals(**restored.meta["totals"])
    alike.check_resumed(start)
    stop.look()
    if start < ready.total_steps:
        store.require_room(state)
    if distributed.talks():
        # Only now that nothing is refused: a refused resume leaves the directory as it was.
        run_directory.write_config(dump_config(config))
        run_directory.identify()
        setup.copy_tokenizer(ready.start.tokenizer_file, directory / "tokenizer")
        _write_lineage(ready, directory)
        timeline.open(directory, start)

    with (
        Watchdog(timeline.progress, config.mesh.hang_seconds, directory),
        contextlib.closing(timeline),
        Report(
            directory,
            total_steps=ready.total_steps,
            start_step=start,
            tensorboard=config.report.tensorboard,
            talk=distributed.talks(),
        ) as report,
    ):
        timeline.enter("compile")
        shapes = _announce(ready, report, start)
        buffers = activations.allocate(ready.program.kept, mesh)
        compiled = _compile(ready, state, buffers)
        stop.look()
        ready.embedder.params = ready.program.sharding.whole(state["params"])
        ready.evaluator.prepare(len(config.evaluation.demo_queries), config.evaluation.demo_top)
        if start == 0 and config.evaluation.tasks:
            with timeline.part("evaluate"):
                report.evaluation("before", ready.evaluator.evaluate(), step=0)
        timeline.enter("step")
        loop = Loop(ready, compiled, report, store, directory, check_lease, stop, timeline, totals)
        state = loop.run(state, buffers, start)
        del buffers

        params = ready.embedder.params = ready.program.sharding.whole(state["params"])
        if config.evaluation.tasks:
            timeline.enter("evaluate")
            report.evaluation("after", ready.evaluator.evaluate(), step=ready.total_steps)
            stop.look()
        timeline.enter("export")
        if config.report.plots and distributed.talks():
            from arcticjax.train import plots  # matplotlib takes a second or two to import

            report.note(f"plot     {plots.plot_run(directory)}")
        export = _export(ready, params, directory, report)
        if export is not None:
            export = f"{run_directory.place}/{export.name}"
        answers = _demo(ready)
        outcome = result.Result(
            status="done",
            steps=ready.total_steps,
            pairs=totals.pairs,
            seconds=time.monotonic() - began,
            seconds_to_first_step=None
            if loop.first_step_at is None
            else loop.first_step_at - began,
            pairs_per_second=totals.pairs / totals.seconds if totals.seconds else None,
            tokens_per_second=totals.tokens / totals.seconds if totals.seconds else None,
            fill=totals.tokens / totals.slots if totals.slots else None,
            compiled_shapes=shapes,
            peak_memory_bytes=_peak_memory(),
            evaluations=result.read_evaluations(directory) if distributed.talks() else {},
            export=export,
            nonfinite_steps=totals.nonfinite,
            loss_spikes=totals.spikes,
        )
        if distributed.talks():
            _close(report, outcome, answers, run_directory)
            run_directory.publish()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("arcticjax run done")
    return outcome


def _compile(ready: setup.Setup, state: states.State, buffers: activations.Kept) -> Any:
    """The train step as an executable, with the guide's parameters, if any, given: compiled once,
    for the one shape that every batch has."""
    batch = meshes.host_to_global(ready.mesh, ready.builder(0).arrays)
    compiled = ready.program.lower(
        states.abstract(state), states.abstract(buffers), states.abstract(batch)
    ).compile()
    guide = ready.guide_params()
    if guide is None:
        return compiled
    return lambda state, buffers, batch: compiled(state, buffers, batch, guide)


def _check_unchanged(config: RunConfig, directory: RunDirectory) -> None:
    """Refuses a config that differs from the directory's in a field that decides what is learned;
    a run that has saved nothing may begin anew with any."""
    file = Path(directory.config_file)
    if not file.exists() or not _has_result_or_checkpoint(directory):
        return
    try:
        before = load_config(file)
    except errors.ConfigError as error:
        raise errors.ConfigError(
            f"{file}: the run's own copy of its config cannot be read, so nothing can tell whether "
            "the config given now is the one it began with. It was damaged or edited, or comes "
            "from another version of arcticjax. Put a whole copy back; or move the file away, and "
            f"the run resumes with the config given now. What is wrong with it:\n{error}"
        ) from None
    changed = [
        (path, before, after)
        for path, before, after in differences(before, config)
        if not any(path == free or path.startswith(f"{free}.") for free in _FREE)
        and not _STATED.fullmatch(path)
    ]
    if changed:
        lines = "".join(
            f"\n  {path}: {before!r} in the run, {after!r} now" for path, before, after in changed
        )
        raise errors.ConfigError(
            f"{directory.place} holds a run with another config:{lines}\n"
            "Give the old values to resume it, or another run.directory to begin a new run"
        )


def _has_result_or_checkpoint(directory: RunDirectory) -> bool:
    steps = open_steps(directory.checkpoints, directory.checkpoint_bucket)
    return bool(
        (directory.path / result.RESULT_FILE).exists() or steps.numbers() or steps.set_aside()
    )


def _check_data(before: Mapping[str, Any], now: Mapping[str, Any], directory: str) -> None:
    """Refuses to resume on other data than the checkpoint was trained on."""
    if before["data_fingerprint"] != now["data_fingerprint"]:
        raise errors.ConfigError(
            f"{directory}: the data changed since the run began: fingerprint "
            f"{before['data_fingerprint']} in the checkpoint, {now['data_fingerprint']} now "
            "(data.sources, data.docstrings). Restore the old files to resume, or give another "
            "run.directory to begin a new run"
        )
    if before["model"] != now["model"]:
        raise errors.ConfigError(
            f"{directory}: the initial model changed since the run began: {before['model']} in the "
            f"checkpoint, {now['model']} now (model.init, model.tokenizer)"
        )
    if before.get("guide") != now.get("guide"):
        raise errors.ConfigError(
            f"{directory}: the guide changed since the run began: {before.get('guide')} in the "
            f"checkpoint, {now.get('guide')} now (loss.guide.model)"
        )


def _finished(directory: RunDirectory) -> result.Result | None:
    """What a finished run has to say, or None."""
    outcome = result.read_result(Path(directory.path))
    if outcome is None or outcome.status != "done":
        return None
    if distributed.talks():
        print(f"{directory.place}: finished at step {outcome.steps}; nothing to do")
        print(result.before_after_table(outcome.evaluations))
    return outcome


def _announce(ready: setup.Setup, report: Report, start: int) -> list[dict[str, Any]]:
    """Says what is about to run, and every shape that will be compiled."""
    shapes, config = ready.shapes, ready.config
    devices = ready.mesh.devices.flat[0]
    compiled = ready.announcements()
    spec = ready.start.spec
    sizes = ", ".join(f"{view.name} {len(view):,}" for view in ready.data.views)
    report.note(
        f"model    {ready.start.name}: {spec.num_layers} layers of {spec.hidden_size}, "
        f"{spec.parameter_count(with_pooler=False):,} parameters, {ready.contract.pooling} pooling"
    )
    if ready.guide is not None:
        spec, own, used = ready.guide.spec, ready.guide.contract, ready.contract
        prompts = own.query_prompt, own.document_prompt
        unused = prompts != (used.query_prompt, used.document_prompt)
        report.note(
            f"guide    {ready.guide.origin}: {spec.num_layers} layers of {spec.hidden_size}, "
            f"{spec.parameter_count(with_pooler=False):,} parameters, {own.pooling} pooling"
            + (f"; it reads the run's prompts in place of its own {prompts}" if unused else "")
        )
    report.note(
        f"data     {len(ready.data.views)} sources, {sum(map(len, ready.data.views)):,} pairs: "
        f"{sizes}"
    )
    for note in ready.data.notes:
        report.note(f"cut      {note}")
    report.note(
        f"devices  {shapes.devices} x {devices.device_kind} ({devices.platform}), "
        f"{jax.process_count()} process(es), {config.train.precision}"
    )
    report.note(
        f"steps    {start} of {ready.total_steps} done, {config.train.global_batch} pairs a step "
        f"({ready.builder.draw.steps_per_epoch} steps an epoch)"
    )
    for one in compiled:
        report.note("compiles " + ", ".join(f"{name} {value}" for name, value in one.items()))
    return compiled


def _export(ready: setup.Setup, params: Any, directory: Path, report: Report) -> Path | None:
    """Writes and certifies the sentence-transformers folder; the path, or None where it is not
    wanted."""
    if not ready.config.export.enabled:
        return None
    target = directory / "export"
    checked = certificate.write_certified(
        target,
        spec=ready.start.spec,
        params=jax.device_get(params),
        tokenizer_folder=directory / "tokenizer",
        contract=ready.contract,
        embed=ready.exact_embedder(params).encode,
        facts=record.run_facts(directory, ready.total_steps),
    )
    if checked is not None:
        report.note(
            f"export   {target}: read back by {checked.reader}, vectors differ by "
            f"{checked.max_difference:.1e} at most"
        )
    return target


def _write_lineage(ready: setup.Setup, directory: Path) -> None:
    """Records where model and data come from; `export.record` reads it."""
    content = json.dumps(ready.lineage(), indent=2, ensure_ascii=False) + "\n"
    path = directory / record.LINEAGE_FILE
    try:
        write_atomically(path, content.encode())
    except OSError as error:
        raise errors.ResourceError(
            f"cannot write {path}: {error.strerror or error}; free disk space, then run the same "
            "command again"
        ) from error


def _demo(ready: setup.Setup) -> list[str]:
    """Answers to the demo queries, as text; every process must call this."""
    wanted = ready.config.evaluation
    if not (wanted.demo_queries and ready.evaluator.tasks):
        return []
    return [
        f"query    {query}" + "".join(f"\n  {score:.3f}  {text[:110]}" for score, text in found)
        for query, found in ready.evaluator.best(wanted.demo_queries, wanted.demo_top)
    ]


def _close(
    report: Report, outcome: result.Result, answers: list[str], directory: RunDirectory
) -> None:
    """Writes the result and shows it: answers to the demo queries, how each source fares, scores
    before and after."""
    for answer in answers:
        report.note(answer)
    report.note(result.source_table(report.source_means()))
    if outcome.evaluations:
        report.note(result.before_after_table(outcome.evaluations))
    result.write_result(Path(directory.path), outcome)
    report.note(f"done     {directory.place}: {outcome.steps} steps in {outcome.seconds:.0f} s")


def _peak_memory() -> int:
    """Peak bytes on the busiest local device, or of the process where devices do not say (CPU)."""
    used = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max((one.get("peak_bytes_in_use", 0) for one in used), default=0)
    if peak:
        return peak
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
