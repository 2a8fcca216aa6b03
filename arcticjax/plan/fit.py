"""What to change in a config that does not fit, cheapest first, and the first change that helps;
the largest global batch that fits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence

from arcticjax import errors
from arcticjax.config import RunConfig
from arcticjax.plan.planner import Plan, Planner

# Compilations of one search at most.
MOST_TRIES = 12
_LARGEST_LEAP = 16

Load = Callable[[Sequence[str]], RunConfig]


def changes(plan: Plan, load: Load) -> Iterator[list[str]]:
    """Settings to try for a plan that does not fit, as `--set` takes them, cheapest first.

    Smaller microbatches cost next to nothing, a second encoding a third more computing,
    recomputing layers as much again, shared parameters communication, and a smaller global batch
    changes what is learned. Where the training step fits and scoring does not: what the run keeps
    meanwhile, then the tasks that are too large.

    load: the config with such settings, or a ConfigError.
    """
    yield from _of_scoring(plan, load) if plan.train_fits else _of_training(plan, load)


def _of_training(plan: Plan, load: Load) -> Iterator[list[str]]:
    rows = [f"train.microbatch={2**power}" for power in reversed(range(_log2(plan.shapes.rows)))]
    yield from _accepted([[one] for one in rows], load)
    second: list[str] = []
    if plan.keeps_activations:
        second = ["train.passes=two"]
        yield from _accepted([second, *([*second, one] for one in rows)], load)
    smallest = [*second, *rows[-1:]]
    if plan.config.train.remat != "full":
        smallest.append("train.remat=full")
        yield from _accepted([smallest], load)
    shared = [f"mesh.fsdp={2**power}" for power in range(1, 4)]
    yield from _accepted(
        ([*smallest, one] for one in shared if plan.devices % int(one[-1]) == 0), load
    )
    batch = plan.config.train.global_batch
    while batch % (2 * plan.devices) == 0:
        batch //= 2
        yield from _accepted([[*smallest, f"train.global_batch={batch}"]], load)


def _of_scoring(plan: Plan, load: Load) -> Iterator[list[str]]:
    second = ["train.passes=two"] if plan.keeps_activations else []
    if second:
        yield from _accepted([second], load)
    tasks = [task for task in plan.config.evaluation.tasks if task not in plan.tasks_too_large]
    if tasks == plan.config.evaluation.tasks:
        tasks = []  # encoding is what is too large
    fewer = [f"evaluation.tasks={json.dumps(tasks)}"]
    if not tasks:
        fewer += ["evaluation.every_steps=null", "evaluation.demo_queries=[]"]
    yield from _accepted([fewer, [*second, *fewer]] if second else [fewer], load)


def search(
    planner: Planner, plan: Plan, load: Load, say: Callable[[str], None]
) -> tuple[list[str], Plan] | None:
    """The first of `changes` that fits, and its plan; None if none of the first `MOST_TRIES` does.

    A change with which the training step fits and scoring does not is followed by those that make
    scoring fit. say: told of every try.
    """
    settings, left = [], MOST_TRIES
    while not plan.fits:
        stage = plan.train_fits
        for more in changes(plan, lambda some, settings=settings: load([*settings, *some])):
            if not left:
                return None
            left -= 1
            # What scoring takes does not matter before the step fits.
            found = planner.plan(load([*settings, *more]), evaluation=stage)
            size = f"{max(found.memory_bytes, found.evaluation_memory) / 2**30:.2f} GiB"
            verdict = "fits" if found.fits else "does not fit"
            say(f"tried    {' '.join([*settings, *more])}: {size}, {verdict}")
            if found.fits:
                settings = [*settings, *more]
                plan = found if stage else planner.plan(load(settings))
                break
        else:
            return None
    return settings, plan


def largest_batch(
    planner: Planner, plan: Plan, load: Load, say: Callable[[str], None]
) -> Plan | None:
    """The plan with the largest global batch whose training step fits, among powers of two times
    that of `plan`; None if none of `MOST_TRIES` does.

    Without scoring, whose memory hardly grows with the batch. load, say: as of `search`.
    """
    known = {plan.config.train.global_batch: plan}
    while len(known) <= MOST_TRIES and (batch := _next_batch(known)) is not None:
        settings = [f"train.global_batch={batch}"]
        found = planner.plan(load(settings), evaluation=False)
        verdict = "fits" if found.train_fits else "does not fit"
        say(f"tried    {settings[0]}: {found.memory_bytes / 2**30:.2f} GiB, {verdict}")
        known[batch] = found
    return known[most] if (most := max(_fitting(known), default=None)) else None


def _next_batch(known: dict[int, Plan]) -> int | None:
    """The global batch to try next; None where the largest is found, or none is left.

    Twice the largest that fits, or more as far as a line through the two largest stays below what a
    device has; at most `_LARGEST_LEAP` times, because what a small batch adds may hide in memory
    that is free again by then. For the same reason memory grows no slower further on: where the
    line says that the double is too much, it is not tried.
    """
    fitting = sorted(_fitting(known))
    failing = min(set(known) - set(fitting), default=math.inf)
    if not fitting:
        return int(failing) // 2 if failing % (2 * known[int(failing)].devices) == 0 else None
    guess = 2 * fitting[-1]
    if len(fitting) > 1:
        before, last = known[fitting[-2]], known[fitting[-1]]
        room = (last.capacity or 0) - last.memory_bytes
        each = (last.memory_bytes - before.memory_bytes) / (fitting[-1] - fitting[-2])
        # `auto` goes over to two passes, which keep less.
        settled = not before.keeps_activations or before.config.train.passes == "one"
        if settled and each * (guess - fitting[-1]) > room:
            return None
        most = min(_LARGEST_LEAP * fitting[-1], failing // 2)
        while 2 * guess <= most and 0 < each * (2 * guess - fitting[-1]) <= room:
            guess *= 2
    return guess if guess < failing else None


def _fitting(known: dict[int, Plan]) -> list[int]:
    return [batch for batch, plan in known.items() if plan.train_fits]


def _accepted(candidates, load: Load) -> Iterator[list[str]]:
    for settings in candidates:
        try:
            load(settings)
        except errors.ConfigError:
            continue
        yield settings


def _log2(value: int) -> int:
    """The largest power of two below `value`, as an exponent, plus one; 0 for 1."""
    return (value - 1).bit_length()
