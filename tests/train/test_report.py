"""A report's files are the truth of a run; its console helps, and never harms."""

import io
import json
import os
import pty
import re
import sys
import threading

import numpy as np
import pytest

from arcticjax.errors import ResourceError
from arcticjax.train.report import MEAN_WINDOW, METRIC_FIELDS, Report
from arcticjax.train.tensorboard import ScalarWriter


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def metrics(step, **changes):
    record = {
        "step": step,
        "loss": 3.0 / step,
        "source": "docs",
        "learning_rate": 1e-4,
        "gradient_norm": 1.5,
        "accuracy": 0.25,
        "fill": 0.97,
        "pairs_per_second": 12345.0,
        "tokens_per_second": 2.5e6,
        "data_wait_fraction": 0.015,
    }
    return record | changes


def open_report(directory, **changes):
    options = {"total_steps": 10, "start_step": 0, "tensorboard": False, "talk": True}
    return Report(directory, **{"stream": io.StringIO(), **options, **changes})


def records(directory, name="metrics.jsonl"):
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def test_steps_are_whole_lines_in_the_order_of_the_contract(tmp_path):
    with open_report(tmp_path) as report:
        report.step({"extra": [1], **metrics(1)})
        assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")
        report.step(metrics(2, loss=np.float32(np.nan), gradient_norm=float("inf")))
    first, second = records(tmp_path)
    assert tuple(first) == (*METRIC_FIELDS, "extra")
    assert first == metrics(1) | {"extra": [1]}
    assert second["loss"] is None
    assert second["non_finite"] == {"loss": "nan", "gradient_norm": "inf"}


def test_a_resumed_run_records_the_same_as_a_straight_one(tmp_path):
    with open_report(tmp_path / "straight") as straight:
        for step in range(1, 9):
            straight.step(metrics(step, source=f"s{step % 3}"))
            if step == 4:
                straight.evaluation(4, {"task": {"ndcg_at_10": 0.5}})
    with open_report(tmp_path / "killed") as killed:
        for step in range(1, 7):
            killed.step(metrics(step, source=f"s{step % 3}"))
            if step == 4:
                killed.evaluation(4, {"task": {"ndcg_at_10": 0.5}})
        killed.evaluation(6, {"task": {"ndcg_at_10": 0.9}})
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "los')
    with open_report(tmp_path / "killed", start_step=5) as resumed:
        for step in range(6, 9):
            resumed.step(metrics(step, source=f"s{step % 3}"))
        assert resumed.source_means() == straight.source_means()
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert (tmp_path / "killed" / name).read_text() == (
            tmp_path / "straight" / name
        ).read_text()
    log = (tmp_path / "killed" / "train.log").read_text()
    assert "metrics.jsonl: 1 unreadable line(s) set aside in metrics.jsonl.rejected" in log
    assert "metrics.jsonl: dropped 1 line(s) after step 5" in log
    assert "evaluations.jsonl: dropped 1 line(s) after step 5" in log


def test_source_means_are_those_of_the_recent_finite_values(tmp_path):
    with open_report(tmp_path) as report:
        for step in range(1, MEAN_WINDOW + 11):
            report.step(metrics(step, source="many", loss=float(step), accuracy=None))
        report.step(metrics(90, source="few", loss=2.0, accuracy=0.5))
        report.step(metrics(91, source="few", loss=float("nan"), accuracy=1.0))
        report.step({"step": 92, "loss": 1.0})
        table = report.source_means()
    assert table == [
        {
            "source": "many",
            "steps": MEAN_WINDOW + 10,
            "last_step": MEAN_WINDOW + 10,
            "loss": np.mean(range(11, MEAN_WINDOW + 11)),
            "accuracy": None,
        },
        {"source": "few", "steps": 2, "last_step": 91, "loss": 2.0, "accuracy": 0.75},
    ]


def test_evaluations_are_one_line_per_task_with_a_step(tmp_path):
    with open_report(tmp_path) as report:
        report.evaluation("before", {"a": {"ndcg_at_10": 0.1}, "b": {"ndcg_at_10": 0.2}})
        report.step(metrics(3))
        report.evaluation(np.int64(3), {"a": {"ndcg_at_10": np.float64(0.3)}})
        report.evaluation("after", {"a": {"ndcg_at_10": 0.4}}, step=10)
    assert records(tmp_path, "evaluations.jsonl") == [
        {"step": 0, "label": "before", "task": "a", "ndcg_at_10": 0.1},
        {"step": 0, "label": "before", "task": "b", "ndcg_at_10": 0.2},
        {"step": 3, "label": 3, "task": "a", "ndcg_at_10": 0.3},
        {"step": 10, "label": "after", "task": "a", "ndcg_at_10": 0.4},
    ]


def test_notes_carry_utc_time_in_the_log_and_are_shown_as_they_are(tmp_path):
    stream = io.StringIO()
    with open_report(tmp_path, stream=stream) as report:
        report.note("[bold]one[/bold] 日本\ntwo")
    assert stream.getvalue() == "[bold]one[/bold] 日本\ntwo\n"
    log = (tmp_path / "train.log").read_text(encoding="utf-8")
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    assert re.fullmatch(rf"{stamp} \[bold\]one\[/bold\] 日本\n {{21}}two\n", log)


def test_a_silent_process_touches_nothing(tmp_path):
    stream = io.StringIO()
    with open_report(tmp_path / "run", stream=stream, talk=False, tensorboard=True) as report:
        report.step(metrics(1))
        report.note("x")
        report.evaluation("before", {"a": {"ndcg_at_10": 0.1}})
        assert report.source_means()[0]["steps"] == 1
    assert stream.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_plain_lines_are_the_first_the_last_and_one_per_five_seconds(tmp_path):
    stream, clock = io.StringIO(), Clock()
    with open_report(tmp_path, stream=stream, clock=clock, total_steps=20) as report:
        for step in range(1, 21):
            clock.now += 2.0
            report.step(metrics(step))
        assert "step 20/20" in stream.getvalue()  # before what is said after the last step
    shown = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert shown == [1, 4, 7, 10, 13, 16, 19, 20]
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().splitlines()[1] == (
        "step 4/20  loss 0.7500  accuracy 25.0 %  12.3k pairs/s  2.5M tokens/s  fill 97.0 %  "
        "data wait 1.5 %  [docs]  left 0:00:32"
    )


def test_a_stopped_run_still_shows_its_last_step(tmp_path):
    stream = io.StringIO()
    with open_report(tmp_path, stream=stream, clock=Clock()) as report:
        report.step(metrics(1))
        report.step(metrics(2))
        assert "step 2/10" not in stream.getvalue()
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/10", "2/10"]


def test_time_left_leaves_start_up_and_compilation_out(tmp_path):
    clock = Clock()
    with open_report(tmp_path, clock=clock, total_steps=100, start_step=40) as report:
        assert report.seconds_left() is None
        clock.now += 300.0
        report.step(metrics(41))
        assert report.seconds_left() is None
        for step in (45, 50):
            clock.now += 10.0
            report.step(metrics(step))
        assert report.seconds_left() == pytest.approx(50 * 20 / 9)


def test_a_console_that_goes_away_or_lacks_letters_does_not_stop_the_run(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    broken = open(writer, "w", buffering=1)
    with open_report(tmp_path / "pipe", stream=broken) as report:
        report.note("x")
        report.step(metrics(1))
    with pytest.raises(BrokenPipeError):
        broken.close()
    closed = io.StringIO()
    closed.close()
    with open_report(tmp_path / "closed", stream=closed) as report:
        report.step(metrics(1))
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with open_report(tmp_path / "ascii", stream=ascii_only) as report:
        report.note("日")
    assert ascii_only.buffer.getvalue() == b"\\u65e5\n"
    assert len(records(tmp_path / "pipe")) == len(records(tmp_path / "closed")) == 1


def test_files_that_cannot_be_written_are_resource_errors(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"cannot write .*file.train\.log"):
        open_report(tmp_path / "file")
    with open_report(tmp_path / "run") as report:
        report._metrics.close()
        report._metrics._file = open("/dev/full", "ab")
        with pytest.raises(ResourceError, match=r"cannot write .*metrics\.jsonl.*No space left"):
            report.step(metrics(1))
        report._metrics._file.raw.close()


def on_a_terminal(tmp_path, monkeypatch, work, columns=80):
    """What `work(report)` puts on an 80-column terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.delenv("NO_COLOR", raising=False)
    leader, follower = pty.openpty()
    seen = bytearray()

    def read():
        while True:
            try:
                chunk = os.read(leader, 4096)
            except OSError:  # the follower has closed
                return
            if not chunk:
                return
            seen.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with open(follower, "w", encoding="utf-8") as stream:
        with open_report(tmp_path, stream=stream) as report:
            work(report)
    reader.join()
    os.close(leader)
    return seen.decode()


def test_a_terminal_gets_a_bar_with_notes_above_and_is_given_back(tmp_path, monkeypatch):
    def work(report):
        for step in range(1, 11):
            report.step(metrics(step))
        report.note("[red]plain[/red] :smile:")

    seen = on_a_terminal(tmp_path, monkeypatch, work)
    assert "━" in seen
    assert "\x1b[?25l" in seen and seen.rstrip().endswith("\x1b[?25h")  # cursor hidden, then shown
    assert "[red]plain[/red] :smile:" in seen
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen).replace("\r", "").split("step 10/10")[-1]
    shown = " ".join(last.split())
    for part in ("100%", "left 0:00:00", "loss 0.3000", "accuracy 25.0 %", "12.3k pairs/s"):
        assert part in shown
    for part in ("2.5M tokens/s", "fill 97.0 %", "data wait 1.5 %", "[docs]"):
        assert part in shown


def test_the_bar_gives_the_terminal_back_when_the_run_fails(tmp_path, monkeypatch):
    def work(report):
        report.step(metrics(1))
        with pytest.raises(KeyError), report:
            raise KeyError("bug")

    before = sys.stdout, sys.stderr
    assert on_a_terminal(tmp_path, monkeypatch, work).rstrip().endswith("\x1b[?25h")
    assert (sys.stdout, sys.stderr) == before


def test_a_dumb_terminal_gets_plain_lines(tmp_path, monkeypatch):
    def work(report):
        report.step(metrics(1))

    set_term = monkeypatch.setenv
    monkeypatch.setattr(
        monkeypatch,
        "setenv",
        lambda name, value: set_term(name, "dumb" if name == "TERM" else value),
    )
    seen = on_a_terminal(tmp_path, monkeypatch, work)
    assert "\x1b" not in seen and seen.startswith("step 1/10  loss 3.0000")


def test_tensorboard_mirrors_finite_numbers(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        ScalarWriter, "add", lambda self, scalars, step: seen.update({step: scalars})
    )
    with open_report(tmp_path, tensorboard=True) as report:
        report.step(metrics(1, ok=True, extra=[1]))
        report.step(metrics(2, loss=float("nan")))
        report.evaluation("after", {"task": {"ndcg_at_10": 0.5, "mrr_at_10": float("nan")}}, step=9)
    assert set(seen[1]) == {*METRIC_FIELDS, "loss/docs"} - {"step", "source"}
    assert seen[1]["loss"] == seen[1]["loss/docs"] == 3.0
    assert set(seen[1]) - set(seen[2]) == {"loss", "loss/docs"}
    assert seen[9] == {"evaluation/task/ndcg_at_10": 0.5}
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_a_broken_mirror_is_told_once_and_never_stops_the_run(tmp_path, monkeypatch):
    def full(self, scalars, step):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ScalarWriter, "add", full)
    with open_report(tmp_path, tensorboard=True) as report:
        report.step(metrics(1))
        report.step(metrics(2))
    assert len(records(tmp_path)) == 2
    log = (tmp_path / "train.log").read_text()
    assert "TensorBoard's files end before step 1: No space left on device" in log
    assert log.count("TensorBoard") == 1


def test_a_mirror_that_cannot_be_opened_is_a_resource_error(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(ResourceError, match=r"cannot write .*tensorboard"):
        open_report(tmp_path, tensorboard=True)
