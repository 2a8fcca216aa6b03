"""What the benchmarks share: turns, ratios, memory and tables."""

import json
import subprocess

import numpy as np
import pytest

from benchmarks import measuring


def test_sides_take_turns_and_the_first_rounds_do_not_count():
    calls = []
    sides = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    found = measuring.interleave(sides, repeats=2, warm=1)
    assert calls == list("ababab")
    assert [len(samples.wall) for samples in found.values()] == [2, 2]
    assert [len(samples.cpu) for samples in found.values()] == [2, 2]
    assert found["b"].value == 6  # of the last call


def test_ratio_is_the_median_of_the_rounds():
    samples = {
        "a": measuring.Samples(cpu=[2.0, 9.0, 40.0]),
        "b": measuring.Samples(cpu=[1.0, 3.0, 10.0]),
    }
    assert measuring.ratio(samples, "a", "b") == 3.0


def test_cpu_seconds_are_of_the_work():
    (samples,) = measuring.interleave({"spin": lambda: sum(range(10**6))}, repeats=1).values()
    assert 0 < samples.cpu[0] <= samples.wall[0] * 1.5 + 0.05  # one thread; clocks are coarse


def test_peak_memory_counts_from_when_it_was_told():
    measuring.forget_peak()
    before = measuring.resident()
    np.ones(1 << 24)  # 128 MiB, given back at once
    assert measuring.peak_resident() - before > 100 << 20
    measuring.forget_peak()
    assert measuring.peak_resident() - measuring.resident() < 50 << 20


def test_pinning_after_an_import_is_refused():
    import tokenizers  # noqa: F401

    with pytest.raises(RuntimeError, match=r"too late: .*tokenizers"):
        measuring.pin(1)


def test_table_and_json(tmp_path):
    rows = [{"batch_size": 1024, "ratio": 1.234, "kind": "naive"}, {"batch_size": 8, "kind": "x"}]
    text = measuring.table(rows, {"kind": "", "batch_size": ",", "ratio": ".2f"})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[0] == ["kind", "batch size", "ratio"]
    assert lines[2:] == [["naive", "1,024", "1.23"], ["x", "8", "-"]]
    measuring.write_json(tmp_path / "out.json", rows, ratio_fp32=1.5)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["rows"] == rows and written["ratio_fp32"] == 1.5
    assert {"date", "versions", "processor", "threads"} <= set(written["machine"])
    assert written["machine"]["versions"]["numpy"] == np.__version__


def test_own_process_gives_its_last_line(tmp_path):
    (tmp_path / "in.json").write_text("[1,\n 2]")
    arguments = ["--compact", str(tmp_path / "in.json")]
    assert measuring.in_own_process("json.tool", arguments) == [1, 2]
    with pytest.raises(subprocess.CalledProcessError):
        measuring.in_own_process("json.tool", [str(tmp_path / "absent")])
