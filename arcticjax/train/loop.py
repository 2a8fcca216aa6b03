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
from arcticjax.checkpoint.store import CheckpointStore
from arcticjax.data import pipeline
from arcticjax.parallel import mesh as meshes
from arcticjax.parallel.stop import StopSignal
from arcticjax.step import state as states
from arcticjax.step.activations import Kept
from arcticjax.train import alike
from arcticjax.train.report import Report
from arcticjax.train.setup import Setup


@dataclass
class Totals:
    """What a run counts as it goes; kept in checkpoints, so that a resumed run counts on."""

    pairs: int = 0
    tokens: float = 0.0
    slots: float = 0.0
    seconds: float = 0.0

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
    totals: Totals = field(default_factory=Totals)
    first_step_at: float | None = None
    _wait: float = 0.0
    _clock: float = 0.0

    def run(self, state: states.State, buffers: Kept, start: int) -> states.State:
        """The state after the last step; consumes state and buffers. Raises NumericsError, or
        Preempted once a stop signal's save is done."""
        setup, config = self.setup, self.setup.config
        last = setup.total_steps
        late: tuple[pipeline.HostBatch, dict[str, jax.Array]] | None = None
        block = meshes.one_at_a_time()
        self._clock = time.monotonic()
        with self.stop.held() as stopped:
            for step, (host, batch) in enumerate(self._batches(start, last), start + 1):
                if step == start + 1 or step % config.mesh.check_every_steps == 0:
                    alike.check_batch(host)
                state, buffers, metrics = self.compiled(state, buffers, batch)
                if block or self.first_step_at is None:
                    jax.block_until_ready(metrics)
                if late is not None:
                    self._report(*late)
                late = (host, metrics)
                self.first_step_at = self.first_step_at or time.monotonic()

                stop = stopped(step)
                evaluate = (
                    bool(config.evaluation.every_steps)
                    and step % config.evaluation.every_steps == 0
                )
                save = stop or step == last or step % config.checkpoint.save_every_steps == 0
                if (evaluate and step < last) or save:
                    # A state is evaluated or saved only once its own numbers are known to be sound.
                    self._report(*late)
                    late = None
                if evaluate and step < last:
                    setup.embedder.params = setup.program.sharding.whole(state["params"])
                    self.report.evaluation(step, setup.evaluator.evaluate())
                if save:
                    self._save(step, state)
                if stop and step < last:
                    self.store.wait()
                    raise errors.Preempted(
                        f"asked to stop: saved step {step} of {last} in {self.directory}; the same "
                        "command resumes"
                    )
                if late is None:
                    self._clock = time.monotonic()  # evaluating and saving are not the steps' time
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

    def _report(self, host: pipeline.HostBatch, metrics: dict[str, jax.Array]) -> None:
        config = self.setup.config
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        wait, self._wait = self._wait, 0.0
        pairs = config.train.global_batch
        step = host.step + 1
        if not values.pop("finite"):
            self._fail(host, values)
        self.totals.add(pairs, values["tokens"], values["fill"], seconds)
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

    def _save(self, step: int, state: states.State) -> None:
        # A directory that another run took over while this one hung must not be written to.
        from_primary(self.check_lease)
        meta = {**self.setup.meta(), "totals": vars(self.totals)}
        self.store.save(step, state, meta)

    def _fail(self, host: pipeline.HostBatch, values: dict[str, Any]) -> None:
        """Records which pairs made a step not finite, and stops the run; the weights are those of
        the step before."""
        step = host.step + 1
        file = self.directory / f"nonfinite_step_{step}.json"
        records = np.sort(host.drawn.records).tolist()
        if jax.process_index() == 0:
            numbers = {name: repr(value) for name, value in values.items()}
            file.write_text(
                json.dumps(
                    {"step": step, "source": host.source, "records": records, "metrics": numbers}
                )
            )
        shown = ", ".join(map(str, records[:8])) + (", ..." if len(records) > 8 else "")
        raise errors.NumericsError(
            f"step {step}: loss {values['loss']} with gradient norm {values['gradient_norm']} is "
            f"not finite; source {host.source!r}, records {shown} (all in {file}). The update was "
            "not applied. Try a lower optimizer.learning_rate, a higher loss.temperature or "
            "train.precision: float32, in another run.directory"
        )
