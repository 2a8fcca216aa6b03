"""The training loop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from arcticjax import errors
from arcticjax.checkpoint.agreement import from_primary
from arcticjax.checkpoint.disk import explain_write_failure
from arcticjax.checkpoint.store import CheckpointStore
from arcticjax.data import pipeline
from arcticjax.parallel import mesh as meshes
from arcticjax.parallel.stop import StopSignal
from arcticjax.step import state as states
from arcticjax.step.activations import Kept
from arcticjax.train import alike
from arcticjax.train.json_lines import write_atomically
from arcticjax.train.report import Report
from arcticjax.train.setup import Setup
from arcticjax.train.spikes import Spikes
from arcticjax.train.timeline import Timeline


@dataclass
class Totals:
    """What a run counts as it goes; kept in checkpoints, so that a resumed run counts on."""

    pairs: int = 0
    tokens: float = 0.0
    slots: float = 0.0
    seconds: float = 0.0
    nonfinite: int = 0
    spikes: int = 0

    def add(self, pairs: int, tokens: float, fill: float, seconds: float) -> None:
        """Counts one step."""
        self.pairs += pairs
        self.tokens += tokens
        self.slots += tokens / fill if fill else 0.0
        self.seconds += seconds


@dataclass
class Loop:
    """Trains from `start` to the last step: step, report the step before, evaluate, save.

    compiled: the train step as an executable. directory: of the run, for records of a failure.
    check_lease: raises, on process 0, where another run took the directory over. stop: noticed
    after every step.
    """

    setup: Setup
    compiled: Callable[
        [states.State, Kept, dict[str, jax.Array]],
        tuple[states.State, Kept, dict[str, jax.Array]],
    ]
    report: Report
    store: CheckpointStore
    directory: Path
    check_lease: Callable[[], None]
    stop: StopSignal
    timeline: Timeline
    totals: Totals = field(default_factory=Totals)
    first_step_at: float | None = None
    _spikes: Spikes = field(default_factory=Spikes)
    _wait: float = 0.0
    _clock: float = 0.0

    def run(self, state: states.State, buffers: Kept, start: int) -> states.State:
        """The state after the last step; consumes state and buffers. Raises NumericsError, or
        Preempted once a stop signal's save is done."""
        setup, config = self.setup, self.setup.config
        last = setup.total_steps
        # Its batch, its numbers, and when it was done where that is known before they are read.
        late: tuple[pipeline.HostBatch, dict[str, jax.Array], float | None] | None = None
        target = states.abstract(state)
        block, waits = meshes.one_at_a_time(), meshes.call_waits()
        self._clock = time.monotonic()
        with self.stop.held() as stopped:
            for step, (host, batch) in enumerate(self._batches(start, last), start + 1):
                if step == start + 1 or step % config.mesh.check_every_steps == 0:
                    alike.check_batch(host)
                state, buffers, metrics = self.compiled(state, buffers, batch)
                if block or self.first_step_at is None:
                    jax.block_until_ready(metrics)
                if late is not None and self._report(*late):
                    # Found out one step late: that step is taken back and done again.
                    state = self._roll_back(step - 1, target)
                    state, buffers, metrics = self.compiled(state, buffers, batch)
                late = (host, metrics, time.monotonic() if waits else None)
                self.timeline.step(step)
                self.first_step_at = self.first_step_at or time.monotonic()

                stop = stopped()
                evaluate = (
                    bool(config.evaluation.every_steps)
                    and step % config.evaluation.every_steps == 0
                )
                save = stop or step == last or step % config.checkpoint.save_every_steps == 0
                if (evaluate and step < last) or save:
                    # A state is evaluated or saved only once its own numbers are known to be sound.
                    if self._report(*late):
                        state = self._roll_back(step, target)
                    late = None
                if evaluate and step < last:
                    setup.embedder.params = setup.program.sharding.whole(state["params"])
                    with self.timeline.part("evaluate"):
                        self.report.evaluation(step, setup.evaluator.evaluate())
                if save:
                    with self.timeline.part("save"):
                        self._save(step, state)
                if stop and step < last:
                    with self.timeline.part("save"):
                        self.store.wait()
                    raise errors.Preempted(
                        f"asked to stop: saved step {step} of {last} in {config.run.directory}; "
                        "the same command resumes"
                    )
                if late is None:
                    self._clock = time.monotonic()  # evaluating and saving are not the steps' time
        with self.timeline.part("save"):
            self.store.wait()
        return state

    def _batches(
        self, start: int, stop: int
    ) -> Iterator[tuple[pipeline.HostBatch, dict[str, jax.Array]]]:
        """Batches on the devices, each sent while the step before runs; counts the time spent
        waiting for data."""
        data = self.setup.config.data
        hosts = pipeline.batches(
            self.setup.builder, start, stop, threads=data.threads, prefetch=data.prefetch
        )
        ahead: tuple[pipeline.HostBatch, dict[str, jax.Array]] | None = None
        while True:
            began = time.monotonic()
            with self.timeline.part("data"):
                host = next(hosts, None)
                sent = (
                    None
                    if host is None
                    else (host, meshes.host_to_global(self.setup.mesh, host.arrays))
                )
            self._wait += time.monotonic() - began
            if ahead is not None:
                yield ahead
            if sent is None:
                return
            ahead = sent

    def _report(
        self, host: pipeline.HostBatch, metrics: dict[str, jax.Array], done: float | None
    ) -> bool:
        """Records a step. True where the weights shall go back to those of a checkpoint."""
        config = self.setup.config
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        now = time.monotonic() if done is None else done
        seconds, self._clock = now - self._clock, now
        wait, self._wait = self._wait, 0.0
        pairs = config.train.global_batch
        step = host.step + 1
        finite = values.pop("finite")
        if finite:
            self.totals.add(pairs, values["tokens"], values["fill"], seconds)
            spike = self._spikes.look(host.source, values["loss"])
            if spike is not None:
                self.totals.spikes += 1
                self.report.note(f"step {step}: {spike}; the step stands")
        else:
            self._judge(host, values)
        if step % config.train.log_every_steps == 0 or step == self.setup.total_steps:
            self.report.step(
                {
                    "step": step,
                    "source": host.source,
                    "epoch": host.drawn.epoch,
                    "pairs_per_second": pairs / seconds,
                    "tokens_per_second": values["tokens"] / seconds,
                    "data_wait_fraction": min(1.0, wait / seconds),
                    **values,
                }
            )
        return not finite and config.train.nonfinite == "rollback"

    def _roll_back(self, step: int, target: states.State) -> states.State:
        """The state of the newest checkpoint, or the initial one, as the one after `step`."""
        with self.timeline.part("restore"):
            self.store.wait()
            restored = self.store.restore(target)
        state = self.setup.initial_state() if restored is None else restored.state
        found = 0 if restored is None else restored.step
        self.report.note(f"step {step}: back to the weights of step {found}")
        return {**state, "step": meshes.replicate(self.setup.mesh, np.int32(step))}

    def _save(self, step: int, state: states.State) -> None:
        # A directory that another run took over while this one hung must not be written to.
        from_primary(self.check_lease)
        meta = {**self.setup.meta(), "totals": vars(self.totals)}
        self.store.save(step, state, meta)

    def _judge(self, host: pipeline.HostBatch, values: dict[str, Any]) -> None:
        """Records which pairs made a step not finite; raises NumericsError where that ends the run.

        The weights are those of the step before. All processes have the same numbers and so judge
        alike.
        """
        wanted = self.setup.config.train
        self.totals.nonfinite += 1
        step = host.step + 1
        file = self.directory / f"nonfinite_step_{step}.json"
        records = np.sort(host.drawn.records).tolist()
        if jax.process_index() == 0:
            numbers = {name: repr(value) for name, value in values.items()}
            content = {"step": step, "source": host.source, "records": records, "metrics": numbers}
            with explain_write_failure(file, f"the records of step {step}", None):
                write_atomically(file, json.dumps(content).encode())
        shown = ", ".join(map(str, records[:8])) + (", ..." if len(records) > 8 else "")
        what = (
            f"step {step}: loss {values['loss']} with gradient norm {values['gradient_norm']} is "
            f"not finite; source {host.source!r}, records {shown} (all in {file}). The update was "
            "not applied"
        )
        advice = (
            "Try a lower optimizer.learning_rate, a higher loss.temperature or train.precision: "
            "float32, in another run.directory"
        )
        if wanted.nonfinite == "error":
            raise errors.NumericsError(
                f"{what}. {advice}; or go on with train.nonfinite: skip or rollback"
            )
        if self.totals.nonfinite > wanted.nonfinite_limit:
            raise errors.NumericsError(
                f"{what}. It is one more than train.nonfinite_limit = {wanted.nonfinite_limit}. "
                f"{advice}"
            )
        self.report.note(
            f"{what} ({self.totals.nonfinite} of train.nonfinite_limit = {wanted.nonfinite_limit})"
        )
