"""What an evaluation says of its time."""

import io

from arcticjax.evaluate.progress import Progress, seconds


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_time_left_follows_what_was_reached():
    clock, stream = Clock(), io.StringIO()
    shown = Progress({"a": 100.0, "b": 300.0}, 10.0, talk=True, stream=stream, clock=clock)
    assert shown.left() == 40  # by the measurement
    shown.begin("a", 10)
    clock.now = 20.0
    shown.encoded(5)
    assert shown.left() == (400 - 50) / (50 / 20)
    clock.now = 30.0
    shown.finish("nDCG@10 0.5")
    assert shown.left() == 300 / (100 / 30)
    said = stream.getvalue().splitlines()
    assert said == [
        "a: begun, about 0:00:40 of encoding left in all",
        "a: 5 of 10 texts, about 0:02:20 left",
        "a: nDCG@10 0.5",
    ]


def test_the_first_estimate_does_not_promise_nothing():
    """Loading and compiling take longer than to encode a small task."""
    clock, stream = Clock(), io.StringIO()
    shown = Progress({"a": 40.0, "b": 40.0}, 1000.0, talk=True, stream=stream, clock=clock)
    assert shown.estimate() == "about 0:00:01 of encoding"
    shown.begin("a", 10)
    clock.now = 30.0
    shown.encoded(10)
    assert shown.estimate() == "about 0:00:30"


def test_lines_come_now_and_then():
    clock, stream = Clock(), io.StringIO()
    shown = Progress({"a": 100.0}, 10.0, talk=True, stream=stream, clock=clock)
    shown.begin("a", 100)
    for _ in range(40):
        clock.now += 1
        shown.encoded(1)
    assert len(stream.getvalue().splitlines()) == 1 + 4


def test_an_unknown_size_is_said_and_others_are_silent():
    shown = Progress({"a": None}, 10.0, talk=False, stream=(stream := io.StringIO()))
    shown.begin("a", None)
    shown.encoded(5)
    assert shown.left() is None and not stream.getvalue()
    assert shown.estimate() == "an unknown time" and seconds(3661.2) == "1:01:01"
