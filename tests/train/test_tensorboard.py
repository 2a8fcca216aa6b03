"""Event files are what TensorBoard reads, by tensorboardX's own message types and checksum."""

import struct
import sys
import time
import warnings

import pytest

from arcticjax.train.tensorboard import ScalarWriter


@pytest.fixture(scope="module")
def judge():
    """tensorboardX's Event and crc32c; it would import torch, which these tests do without."""
    patch = pytest.MonkeyPatch()
    if "tensorboardX" not in sys.modules:
        patch.setitem(sys.modules, "torch", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboardX.crc32c import crc32c
        from tensorboardX.proto.event_pb2 import Event
    patch.undo()
    return Event, crc32c


def read(path, judge):
    """Every event of a file, its framing checked."""
    event_type, crc32c = judge
    content, at, events = path.read_bytes(), 0, []

    def check(part, stored):
        crc = crc32c(part)
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        assert struct.unpack("<I", stored) == (masked,)

    while at < len(content):
        length = content[at : at + 8]
        check(length, content[at + 8 : at + 12])
        end = at + 12 + struct.unpack("<Q", length)[0]
        check(content[at + 12 : end], content[end : end + 4])
        events.append(event_type.FromString(content[at + 12 : end]))
        at = end + 4
    return events


def test_events_read_back_with_tags_steps_and_values(tmp_path, judge):
    writer = ScalarWriter(tmp_path / "deep" / "folder", purge_step=301)
    writer.add({"loss": 0.1, "evaluation/日本/ndcg_at_10": -2.5, "big": 1e300}, 301)
    writer.add({}, 2**40)
    (path,) = (tmp_path / "deep" / "folder").iterdir()
    version, start, first, second = read(path, judge)  # before closing: whole and flushed
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (301, start.session_log.START)
    assert first.step == 301
    assert abs(first.wall_time - time.time()) < 60
    found = {value.tag: value.simple_value for value in first.summary.value}
    assert found == {
        "loss": struct.unpack("<f", struct.pack("<f", 0.1))[0],
        "evaluation/日本/ndcg_at_10": -2.5,
        "big": float("inf"),
    }
    assert second.step == 2**40
    writer.close()
    writer.close()


def test_a_resumed_run_gets_a_file_of_its_own(tmp_path, judge):
    for start in (0, 5):
        writer = ScalarWriter(tmp_path, purge_step=start + 1)
        writer.add({"loss": 1.0}, start + 1)
        writer.close()
    starts = sorted(read(path, judge)[1].step for path in tmp_path.iterdir())
    assert starts == [1, 6]
    assert all("tfevents" in path.name for path in tmp_path.iterdir())
