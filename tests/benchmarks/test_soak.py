"""The soak: what it compares, how it tells kills, and that a few of them leave the bits alone."""

import argparse
import json
import sys

import pytest

from benchmarks import soak
from tests import tiny


def run_folder(path, loss, rate):
    path.mkdir()
    line = {"step": 1, "loss": loss, "pairs_per_second": rate, "data_wait_fraction": rate / 9}
    (path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (path / "evaluations.jsonl").write_text("")
    return path


def test_records_are_all_but_the_rates(tmp_path):
    one, same, other = (
        soak.records(run_folder(tmp_path / name, loss, rate))
        for name, loss, rate in (("a", 1.5, 10.0), ("b", 1.5, 3e-5), ("c", 1.5000001, 10.0))
    )
    assert one == same != other


def test_kills_are_counted_by_where_they_fell():
    def kill(signal, part, code, reported, kept):
        return {"signal": signal, "part": part, "code": code, "reported": reported, "kept": kept}

    lines = soak.table(
        [
            kill("SIGKILL", "step", -9, 17, 10),
            kill("SIGTERM", "step", 42, 31, 31),
            kill("SIGTERM", "start", -15, 31, 31),
            kill("SIGKILL", "step", -9, 45, 40),
        ]
    ).splitlines()
    assert lines[2:] == ["| step | 2 | 1 | -9, 42 | 7 |", "| start | 0 | 1 | -15 | 0 |"]


def test_a_run_that_ends_as_none_should_stops_it(tmp_path):
    command = [sys.executable, "-c", "print('no disk'); raise SystemExit(8)"]
    with pytest.raises(SystemExit, match=r"no disk\n\nSIGTERM after 100\.00 s: 8"):
        soak.kill(command, tmp_path, soak.signal.SIGTERM, 100)


@pytest.mark.slow
def test_a_few_kills(tmp_path):
    changes = soak._TINY | {"train.total_steps": 120}
    options = argparse.Namespace(
        config=tiny.run_config(tmp_path / "tiny", **changes), kills=4, seed=1, span=None
    )
    found = soak.soak(options, tmp_path)
    assert len(found["kills"]) == 4 and found["runs"] >= 1
