from dataclasses import dataclass

import pytest

from arcticjax.config import load_config
from arcticjax.data.layout import Shapes
from arcticjax.plan import fit, report
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

    @property
    def shapes(self):
        return Shapes(self.devices, 4, 32, self.rows, 16, 32)


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


def test_nothing_is_proposed_where_only_scoring_does_not_fit(load):
    assert list(fit.changes(Stub(load([]), train_fits=True), load)) == []
    assert "fewer documents" in report.advice([])


class Planner:
    """Fits below a number of rows."""

    def __init__(self, most):
        self.most, self.tried = most, []

    def plan(self, config, *, evaluation):
        assert not evaluation
        self.tried.append((config.train.microbatch, config.train.passes))
        return Stub(config, fits=(config.train.microbatch or 99) <= self.most)


def test_the_first_change_that_fits_is_taken(load):
    planner, said = Planner(2), []
    found = fit.search(planner, Stub(load([])), load, said.append)
    assert found is not None and found[0] == ["train.microbatch=2"]
    assert [one for one, _ in planner.tried] == [4, 2]
    assert said == [
        "tried    train.microbatch=4: 2.00 GiB, does not fit",
        "tried    train.microbatch=2: 2.00 GiB, fits",
    ]


def test_the_search_ends(load, monkeypatch):
    monkeypatch.setattr(fit, "MOST_TRIES", 3)
    planner = Planner(0)
    assert fit.search(planner, Stub(load([])), load, lambda line: None) is None
    assert len(planner.tried) == 3
