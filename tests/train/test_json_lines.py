"""Line files stay valid JSON and whole through kills, foreign lines and full disks."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from arcticjax.errors import ResourceError
from arcticjax.train.json_lines import JsonLines, read_json_lines, to_json_line, write_atomically


def strict(text):
    """Parses JSON and refuses Python's own NaN and Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_non_finite_numbers_become_null_and_are_named():
    line = to_json_line(
        {"step": 1, "loss": math.nan, "norms": [1.0, -math.inf], "deep": {"x": np.float32("inf")}}
    )
    assert strict(line) == {
        "step": 1,
        "loss": None,
        "norms": [1.0, None],
        "deep": {"x": None},
        "non_finite": {"loss": "nan", "norms.1": "-inf", "deep.x": "inf"},
    }
    assert "non_finite" not in strict(to_json_line({"step": 1, "loss": 0.5}))


def test_array_scalars_are_numbers_and_a_line_is_one_line():
    line = to_json_line({"step": np.int64(3), "loss": jnp.float32(0.5), "text": "a\nb\u2028日"})
    assert strict(line) == {"step": 3, "loss": 0.5, "text": "a\nb\u2028日"}
    assert len(line.splitlines()) == 1
    with pytest.raises(TypeError):
        to_json_line({"step": 1, "value": object()})


def test_reading_parts_records_from_what_is_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path) == ([], [])
    good = b'{"step": 1, "loss": 2.0}'
    foreign = [
        b"\x00\x00\x00",
        b"\xff\xfe{}",
        b"[1]",
        b'{"loss": 1}',
        b'{"step": "2"}',
        b'{"step": true}',
        b'{"step": -1}',
        b"[" * 100_000,
    ]
    torn = b'{"step": 2, "lo'
    path.write_bytes(b"\n".join([good, *foreign, b"", good, torn]))
    records, rejected = read_json_lines(path)
    assert records == [json.loads(good)] * 2
    assert rejected == [*foreign, torn]


def test_resuming_drops_later_steps_and_sets_foreign_lines_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nnot ours\n{"step": 2}\n{"step": 3}\n{"step": 4')
    lines = JsonLines(path, last_step=2)
    assert (lines.kept, lines.dropped, lines.rejected) == ([{"step": 1}, {"step": 2}], 1, 2)
    lines.append({"step": 3, "again": True})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'
    lines.close()
    lines.close()
    assert (tmp_path / "metrics.jsonl.rejected").read_bytes() == b'not ours\n{"step": 4\n'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.jsonl.rejected"]


def test_a_whole_last_line_without_its_break_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    lines = JsonLines(path, last_step=9)
    lines.append({"step": 3})
    lines.close()
    assert [record["step"] for record in read_json_lines(path)[0]] == [1, 2, 3]


def test_a_good_file_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1,   "loss":2}\n')
    before = path.stat().st_ino
    JsonLines(path, last_step=1).close()
    assert path.stat().st_ino == before
    assert path.read_bytes() == b'{"step":1,   "loss":2}\n'


def test_every_line_is_on_the_file_at_once(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl", last_step=0)
    for step in range(1, 4):
        lines.append({"step": step})
        assert len(lines.path.read_bytes().splitlines()) == step
    lines.close()


def test_a_path_that_cannot_be_used_is_a_resource_error(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ResourceError, match=r"cannot read .*metrics\.jsonl"):
        JsonLines(tmp_path / "metrics.jsonl", last_step=0)
    with pytest.raises(ResourceError, match=r"cannot write .*m\.jsonl.*free disk space"):
        JsonLines(tmp_path / "absent" / "m.jsonl", last_step=0)
    full = JsonLines(tmp_path / "m.jsonl", last_step=0)
    full.close()
    full._file = open("/dev/full", "ab")
    with pytest.raises(ResourceError, match="No space left on device"):
        full.append({"step": 1})
    full._file.raw.close()


def test_a_failed_rewrite_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("arcticjax.train.json_lines.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
