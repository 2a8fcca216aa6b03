"""goodput.json: every second of a run belongs to one part, over all attempts."""

import datetime
import json

import pytest

from arcticjax.train.timeline import GOODPUT_FILE, PARTS, Timeline


class Clock:
    """Seconds and the time of day, moved by hand."""

    def __init__(self):
        self.seconds = 1000.0
        self.day = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)

    def __call__(self):
        return self.seconds

    def wait(self, seconds):
        self.seconds += seconds
        self.day += datetime.timedelta(seconds=seconds)

    def timeline(self):
        return Timeline(self, lambda: self.day)


@pytest.fixture
def clock():
    return Clock()


def read(folder):
    return json.loads((folder / GOODPUT_FILE).read_text())


def attempt(clock, folder, first, last):
    """An attempt of 3 s start, 5 s restore and 2 s a step, 1 s of them waiting for data."""
    timeline = clock.timeline()
    clock.wait(3)
    timeline.enter("restore")
    clock.wait(5)
    timeline.open(folder, first)
    timeline.enter("step")
    for step in range(first, last):
        with timeline.part("data"):
            clock.wait(1)
        clock.wait(1)
        timeline.step(step + 1)
    return timeline


def test_parts_add_up_to_the_wall_time(clock, tmp_path):
    timeline = attempt(clock, tmp_path, 0, 10)
    with timeline.part("save"):
        clock.wait(4)
    timeline.close()
    found = read(tmp_path)
    assert found["seconds"] == sum(found["parts"].values()) == 3 + 5 + 20 + 4
    assert {part: seconds for part, seconds in found["parts"].items() if seconds} == {
        "start": 3, "restore": 5, "data": 10, "step": 10, "save": 4
    }  # fmt: skip
    assert found["goodput"] == 10 / 32
    assert found["attempts"][0]["steps"] == [0, 10]


def test_time_between_attempts_and_steps_done_again_are_told_apart(clock, tmp_path):
    attempt(clock, tmp_path, 0, 10).close()  # killed after step 10, the checkpoint is of step 6
    clock.wait(60)
    attempt(clock, tmp_path, 6, 12).close()
    found = read(tmp_path)
    assert found["parts"]["down"] == 60
    assert found["parts"]["lost"] == 4
    assert found["parts"]["step"] == 12
    assert found["seconds"] == sum(found["parts"].values()) == 28 + 60 + 20
    assert [one["steps"] for one in found["attempts"]] == [[0, 10], [6, 12]]


def test_the_file_follows_every_rare_part_and_seconds_of_steps(clock, tmp_path):
    """A killed run leaves where it was."""
    timeline = attempt(clock, tmp_path, 0, 1)
    with timeline.part("evaluate"):
        assert read(tmp_path)["attempts"][0]["part"] == "evaluate"
    assert read(tmp_path)["attempts"][0]["part"] == "step"
    written = read(tmp_path)["seconds"]
    with timeline.part("data"):
        clock.wait(1)
    assert read(tmp_path)["seconds"] == written
    with timeline.part("data"):
        clock.wait(10)
    assert read(tmp_path)["seconds"] == written + 11


@pytest.mark.parametrize("content", ["", "{", "[]", '{"attempts": [{"began": "now"}]}', '{"a": 1}'])
def test_a_damaged_file_is_begun_anew(clock, tmp_path, content):
    (tmp_path / GOODPUT_FILE).write_text(content)
    attempt(clock, tmp_path, 0, 2).close()
    assert len(read(tmp_path)["attempts"]) == 1


def test_a_clock_set_back_makes_no_negative_time(clock, tmp_path):
    attempt(clock, tmp_path, 0, 2).close()
    clock.day -= datetime.timedelta(days=1)
    attempt(clock, tmp_path, 2, 4).close()
    found = read(tmp_path)
    assert found["parts"]["down"] == 0
    assert found["seconds"] == pytest.approx(sum(found["parts"].values()))


def test_a_disk_that_is_full_is_told_once_and_does_not_stop_the_run(clock, tmp_path, caplog):
    timeline = attempt(clock, tmp_path, 0, 1)
    (tmp_path / GOODPUT_FILE).unlink()
    (tmp_path / GOODPUT_FILE).mkdir()
    for part in ("evaluate", "save", *PARTS):
        timeline.enter(part)
    timeline.close()
    assert len(caplog.records) == 1 and "is not kept up to date" in caplog.text
