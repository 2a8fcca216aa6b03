"""What to change in a config that does not fit, cheapest first, and the first change that helps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from arcticjax import errors
from arcticjax.config import RunConfig
from arcticjax.plan.planner import Plan, Planner

# Compilations of one search at most.
MOST_TRIES = 12

Load = Callable[[Sequence[str]], RunConfig]


def changes(plan: Plan, load: Load) -> Iterator[list[str]]:
    """Settings to try for a plan that does not fit, as `--set` takes them, cheapest first.

    Smaller microbatches cost next to nothing, a second encoding a third more computing,
    recomputing layers as much again, shared parameters communication, and a smaller global batch
    changes what is learned.

    load: the config with such settings, or a ConfigError. Nothing where the training step fits and
    only scoring does not: its memory depends on none of them.
    """
    if plan.train_fits:
        return
    rows = [f"train.microbatch={2**power}" for power in reversed(range(_log2(plan.shapes.rows)))]
    yield from _accepted([[one] for one in rows], load)
    second: list[str] = []
    if plan.passes == "one":
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


def search(
    planner: Planner, plan: Plan, load: Load, say: Callable[[str], None]
) -> tuple[list[str], Plan] | None:
    """The first of `changes` that fits, and its plan; None if none of the first `MOST_TRIES` does.

    say: told of every try.
    """
    for tried, settings in enumerate(changes(plan, load)):
        if tried == MOST_TRIES:
            break
        found = planner.plan(load(settings), evaluation=False)
        size = f"{found.memory_bytes / 2**30:.2f} GiB"
        say(f"tried    {' '.join(settings)}: {size}, {'fits' if found.fits else 'does not fit'}")
        if found.fits:
            return settings, found
    return None


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
