import dataclasses
from dataclasses import dataclass

import pytest

from arcticjax.config import load_config
from arcticjax.data.layout import Shapes
from arcticjax.plan import fit
from tests import tiny


@dataclass
class Stub:
    """A plan as far as the search looks at one."""

    config: object
    rows: int = 8
    passes: str = "one"
    devices: int = 4
    fits: bool = False
    train_fits: bool = False
    memory_bytes: int = 2**31
    evaluation_memory: int = 0
    capacity: int | None = None
    tasks_too_large: list = dataclasses.field(default_factory=list)

    @property
    def shapes(self):
        return Shapes(self.devices, 4, 32, self.rows, 16, 32)

    @property
    def keeps_activations(self):
        return self.passes == "one"


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    file = tiny.run_config(tmp_path_factory.mktemp("fit"), **{"train.global_batch": 16})
    return lambda settings: load_config(file, settings)


def test_changes_from_the_cheapest_to_the_dearest(load):
    rows = ["train.microbatch=4", "train.microbatch=2", "train.microbatch=1"]
    two, full = "train.passes=two", "train.remat=full"
    assert list(fit.changes(Stub(load([])), load)) == [
        *([one] for one in rows),
        [two],
        *([two, one] for one in rows),
        [two, rows[-1], full],
        [two, rows[-1], full, "mesh.fsdp=2"],
        [two, rows[-1], full, "mesh.fsdp=4"],
        [two, rows[-1], full, "train.global_batch=8"],
        [two, rows[-1], full, "train.global_batch=4"],
    ]


def test_what_is_set_already_is_not_proposed(load):
    stub = Stub(load(["train.remat=full"]), rows=1, passes="two", devices=1)
    found = list(fit.changes(stub, load))
    assert found[:2] == [["train.global_batch=8"], ["train.global_batch=4"]]
    # A row count of no power of two goes to the next below.
    assert next(iter(fit.changes(Stub(load([]), rows=6), load))) == ["train.microbatch=4"]


def test_what_scoring_needs_is_made_smaller(load):
    """First what the run keeps meanwhile, then the tasks that are too large."""
    sets = ["evaluation.tasks=['beir:a', 'beir:b']", "evaluation.every_steps=2"]
    two, fewer = "train.passes=two", 'evaluation.tasks=["beir:b"]'
    stub = Stub(load(sets), train_fits=True, tasks_too_large=["beir:a"])
    with_tasks = lambda settings: load([*sets, *settings])  # noqa: E731
    assert list(fit.changes(stub, with_tasks)) == [[two], [fewer], [two, fewer]]
    # Where encoding is too large no task is left, and what speaks of tasks goes with them.
    none = ["evaluation.tasks=[]", "evaluation.every_steps=null", "evaluation.demo_queries=[]"]
    stub = Stub(load(sets), train_fits=True, passes="two")
    assert list(fit.changes(stub, with_tasks)) == [none]


class Planner:
    """Trains below a number of rows, and scores without tasks or if `scores`."""

    def __init__(self, most, scores=True):
        self.most, self.scores, self.tried = most, scores, []

    def plan(self, config, *, evaluation=True):
        self.tried.append((config.train.microbatch, config.train.passes))
        trains = (config.train.microbatch or 99) <= self.most
        scores = self.scores or not evaluation or not config.evaluation.tasks
        return Stub(config, train_fits=trains, fits=trains and scores)


def test_the_first_change_that_fits_is_taken(load):
    planner, said = Planner(2), []
    found = fit.search(planner, Stub(load([])), load, said.append)
    assert found is not None and found[0] == ["train.microbatch=2"]
    assert [one for one, _ in planner.tried] == [4, 2, 2]  # the last with what scoring compiles
    assert said == [
        "tried    train.microbatch=4: 2.00 GiB, does not fit",
        "tried    train.microbatch=2: 2.00 GiB, fits",
    ]


def test_the_search_ends(load, monkeypatch):
    monkeypatch.setattr(fit, "MOST_TRIES", 3)
    planner = Planner(0)
    assert fit.search(planner, Stub(load([])), load, lambda line: None) is None
    assert len(planner.tried) == 3


def test_a_step_that_fits_is_followed_by_scoring_that_fits(load):
    said = []
    found = fit.search(Planner(2, scores=False), Stub(load([])), load, said.append)
    assert found is not None and found[1].fits
    assert found[0][:2] == ["train.microbatch=2", "evaluation.tasks=[]"]
    assert said[2] == "tried    train.microbatch=2 train.passes=two: 2.00 GiB, does not fit"


class Growing:
    """Memory in proportion to the batch beyond a base; below `kept_until`, with one pass, a hundred
    times as much for each pair."""

    def __init__(self, capacity, each=1.0, kept_until=0):
        self.capacity, self.each, self.kept_until = capacity, each, kept_until
        self.tried = []

    def plan(self, config, *, evaluation=True):
        batch = config.train.global_batch
        self.tried.append(batch)
        one = batch < self.kept_until or config.train.passes == "one"
        size = 1000 + int(self.each * batch) * (100 if one else 1)
        passes = "one" if one else "two"
        fits = size <= self.capacity
        return Stub(
            config, passes=passes, memory_bytes=size, train_fits=fits, capacity=self.capacity
        )


def largest(load, planner, batch):
    said = []
    first = planner.plan(load([f"train.global_batch={batch}"]))
    found = fit.largest_batch(planner, first, load, said.append)
    assert len(said) == len(planner.tried) - 1
    return found and found.config.train.global_batch


@pytest.mark.parametrize("capacity", [1000 + 2**12, 1000 + 2**13 - 1])
def test_the_largest_batch_is_found_by_a_line(load, capacity):
    """Two that fit say where the rest lies, and that its double does not fit."""
    planner = Growing(capacity)
    assert largest(load, planner, 16) == 2**12
    assert planner.tried == [16, 32, 2**9, 2**12]  # no leap over more than 16 times


def test_the_largest_batch_where_the_line_misleads(load):
    """One pass for small batches, memory that grows faster later, a first batch too large."""
    assert largest(load, Growing(1000 + 2**12, kept_until=64), 16) == 2**12
    only_one = lambda settings: load(["train.passes=one", *settings])  # noqa: E731
    planner = Growing(1000 + 100 * 63)
    assert largest(only_one, planner, 16) == 32 and planner.tried == [16, 32]
    # Half as much for each pair below 2 ** 10 as above.
    steeper = Growing(1000 + 2**12)
    plan = steeper.plan
    steeper.plan = lambda config, **options: (
        setattr(steeper, "each", 0.5 if config.train.global_batch < 2**10 else 1.0)
        or plan(config, **options)
    )
    assert largest(load, steeper, 16) == 2**12
    assert largest(load, Growing(1000 + 100), 1024) == 64


def test_no_batch_fits(load):
    planner = Growing(10)
    assert largest(load, planner, 64) is None
    assert planner.tried == [64, 32, 16, 8, 4]  # 4 devices
