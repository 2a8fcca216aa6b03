"""The benchmark of cold starts: its clocks, and that its config is one that training takes."""

import argparse
import sys

import pytest

from arcticjax.config import load_config
from benchmarks import cold_start


def command(code):
    return [sys.executable, "-c", code]


def test_first_step_is_when_its_file_has_content(tmp_path):
    mark = tmp_path / "mark"
    code = (
        f"import time; file = open({str(mark)!r}, 'w'); time.sleep(0.2); "
        "print('1', file=file, flush=True); time.sleep(0.4)"
    )
    found = cold_start.timed(command(code), mark)
    assert 0.2 < found["first_step_seconds"] < found["final_seconds"] - 0.3
    assert 0 < found["cpu_seconds"]


def test_a_run_that_fails_or_takes_no_step_is_told(tmp_path, capfdbinary):
    with pytest.raises(SystemExit, match="failed with exit code 3"):
        cold_start.timed(command("print('no disk'); raise SystemExit(3)"), tmp_path / "mark")
    assert b"no disk" in capfdbinary.readouterr().err
    with pytest.raises(SystemExit, match="failed"):
        cold_start.timed(command("pass"), tmp_path / "mark")


def test_the_config_is_one_that_training_takes(tmp_path):
    options = argparse.Namespace(
        shape="16/48", model=cold_start.MODEL, steps=7, batch=4, export=False
    )
    file = tmp_path / "config.yaml"
    text = cold_start.config(options, tmp_path / "p.parquet", tmp_path / "run", tmp_path / "kept")
    file.write_text(cold_start.yaml.safe_dump(text))
    config = load_config(file)
    assert (config.data.query_length, config.data.document_length) == (16, 48)
    assert (config.train.total_steps, config.train.global_batch) == (7, 4)
    assert config.run.compilation_cache == str(tmp_path / "kept")
    assert not config.export.enabled
