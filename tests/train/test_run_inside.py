"""A run watched from inside: what it compiles and announces, the order of its steps, and where the
fields of its config arrive."""

import dataclasses
import inspect
import itertools
import json
import logging
import time
import types
from pathlib import Path

import grain.python as grain
import jax
import numpy as np
import pytest

from arcticjax.export import readers
from arcticjax.models.pretrained import load_pretrained
from arcticjax.step import embedder, search
from arcticjax.step.encode import make_encode
from arcticjax.train.loop import Loop
from tests import tiny
from tests.train.running import Heard, lines, train

pytestmark = pytest.mark.usefixtures("quick_compiler")


@dataclasses.dataclass
class Watched:
    """A finished run, and what was seen of it. In the loop: events; compiled, of a backend."""

    folder: Path
    result: dict
    programs: list
    searches: list
    encoders: list
    reading: list
    events: list
    compiled: list


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Six steps in bfloat16 with all that a run can compile, on two devices."""
    folder, heard, inside = tmp_path_factory.mktemp("watched"), Heard(), False
    seen = Watched(folder, {}, heard.programs, [], [], [], [], [])
    changes = {
        "mesh.data": 2, "model.keep_layers": 1, "train.precision": "bfloat16",
        "train.total_steps": 6, "checkpoint.save_every_steps": 100, "data.threads": 3,
        "data.prefetch": 5, "evaluation.every_steps": 4, "evaluation.demo_queries": ["river stone"],
        "report.tensorboard": True, "report.plots": False,
    }  # fmt: skip

    def noted(into, function, *names):
        def call(*arguments, **options):
            given = inspect.signature(function).bind(*arguments, **options).arguments
            into.append(tuple(given[name] for name in names))
            return function(*arguments, **options)

        return call

    def in_loop(event, function):
        def call(*arguments, **options):
            if inside and (said := event(*arguments)):
                seen.events.append(said)
            return function(*arguments, **options)

        return call

    def loop(self, *arguments):
        nonlocal inside
        steps = itertools.count(1)
        self.compiled = in_loop(lambda *_: f"step {next(steps)}", self.compiled)
        self.report.step = in_loop(lambda values: f"report {values['step']}", self.report.step)
        inside = True
        try:
            return whole_loop(self, *arguments)
        finally:
            inside = False

    def listen(event: str, duration: float, **_: object) -> None:
        if inside and event.endswith("backend_compile_duration"):
            seen.compiled.append(event)

    def of_step(values):
        return "wait" if isinstance(values, dict) and "loss" in values else None

    whole_loop, logger = Loop.run, logging.getLogger("jax")
    jax.clear_caches()  # else what another test compiled would not be heard
    make_encode.cache_clear()
    with pytest.MonkeyPatch.context() as patch, jax.log_compiles():
        patch.setattr(Loop, "run", loop)
        patch.setattr(jax, "block_until_ready", in_loop(of_step, jax.block_until_ready))
        patch.setattr(search, "make_search", noted(seen.searches, search.make_search, "k", "tile"))
        patch.setattr(embedder, "make_encode", noted(seen.encoders, make_encode, "mesh", "dtype"))
        options = noted(seen.reading, grain.ReadOptions, "num_threads", "prefetch_buffer_size")
        patch.setattr(grain, "ReadOptions", options)
        # As where sentence-transformers is not installed.
        patch.setattr(readers, "read_here", lambda reader="auto": True)
        jax.monitoring.register_event_duration_secs_listener(listen)
        logger.addHandler(heard)
        train(tiny.run_config(folder, **changes))
        logger.removeHandler(heard)
    seen.result = json.loads((folder / "run" / "result.json").read_text())
    return seen


def test_every_program_is_announced_and_no_other(watched):
    announced = watched.result["compiled_shapes"]

    def said(program, *fields):
        entries = [one for one in announced if one["program"] == program]
        return sorted(tuple(one[name] for name in fields) for one in entries)

    def shapes(program, dtype):
        found = [types for name, types in watched.programs if name == program]
        return [[one.shape for one in types if one.dtype == dtype] for types in found]

    log = (watched.folder / "run" / "train.log").read_text()
    assert log.count(" compiles ") == len(announced)
    for one in announced:
        assert "compiles " + ", ".join(f"{name} {value}" for name, value in one.items()) in log
    assert len(announced) == 6
    ((*_, step),) = [sorted(found, key=len) for found in shapes("train_step", np.int32)]
    assert said("train_step", "devices", "microbatches", "rows", "row_length") == [step]
    tokens = [max(found) for found in shapes("encode", np.int32)]
    assert said("encode", "devices", "rows", "row_length") == sorted(tokens)
    encoders = {(mesh.devices.size, np.dtype(dtype).name) for mesh, dtype in watched.encoders}
    assert set(said("encode", "devices", "precision")) == encoders
    searched = [(queries[0], documents[1]) for queries, documents in shapes("search", np.float32)]
    assert said("search", "queries", "documents_per_device") == sorted(searched)
    assert said("search", "top_k", "tile") == sorted(set(watched.searches))
    # Whatever else is compiled makes or converts one array.
    names = {"train_step", "encode", "search"}
    assert all(len(types) <= 1 for name, types in watched.programs if name not in names)


def test_nothing_compiles_between_the_first_step_and_the_last(watched):
    assert watched.programs and watched.compiled == []


def test_steps_are_reported_one_step_late_and_wait_for_one_another_on_a_cpu(watched):
    """All of a step's numbers are there before its weights are scored or saved."""
    assert ", ".join(watched.events) == (
        "step 1, wait, step 2, wait, report 1, step 3, wait, report 2, step 4, wait, report 3, "
        "report 4, step 5, wait, step 6, wait, report 5, report 6"
    )


def test_tasks_are_scored_every_so_many_steps(watched):
    scores = watched.result["evaluations"]
    assert list(scores) == ["before", "4", "after"]
    assert len({scores[when]["task"]["ndcg_at_10"] for when in scores}) == 3


def test_the_config_reaches_grain(watched):
    assert watched.reading == [(3, 5)]


def test_the_config_reaches_tensorboard(watched):
    (file,) = (watched.folder / "run" / "tensorboard").iterdir()
    content = file.read_bytes()
    assert all(tag in content for tag in (b"loss/a", b"evaluation/task/ndcg_at_10"))


def test_the_first_layers_can_be_kept_and_bfloat16_exports_exactly(watched):
    """What the step keeps of its forward pass is bfloat16, what it learns float32."""
    run = watched.folder / "run"
    assert load_pretrained(run / "export").spec.num_layers == 1
    (types,) = [types for name, types in watched.programs if name == "train_step"]
    kept = sum(2 * one.size for one in types if one.dtype == "bfloat16")
    assert kept > 0.9 * watched.result["compiled_shapes"][0]["kept_bytes"]
    certificate = json.loads((run / "export" / "certificate.json").read_text())
    assert certificate["passed"] and certificate["reader"] == "arcticjax"


def test_a_step_that_is_waited_for_is_timed_when_it_is_done(tmp_path, monkeypatch):
    """A step takes two seconds here and all else no time, also where its numbers are read together
    with those of the step before."""
    began, taken = time.monotonic(), 0

    def loop(self, *arguments):
        compiled = self.compiled

        def call(*given):
            nonlocal taken
            taken += 2
            return compiled(*given)

        self.compiled = call
        return whole_loop(self, *arguments)

    whole_loop = Loop.run
    monkeypatch.setattr(Loop, "run", loop)
    clock = types.SimpleNamespace(monotonic=lambda: began + taken)
    monkeypatch.setattr("arcticjax.train.loop.time", clock)
    changes = {
        "mesh.data": 2, "model.keep_layers": 1, "train.global_batch": 16, "train.total_steps": 4,
        "checkpoint.save_every_steps": 2, "evaluation.tasks": [], "export.enabled": False,
        "report.plots": False,
    }  # fmt: skip
    train(tiny.run_config(tmp_path, **changes))
    paces = [one["pairs_per_second"] for one in lines(tmp_path)]
    np.testing.assert_allclose(paces, [16 / 2] * 4, rtol=1e-6)
