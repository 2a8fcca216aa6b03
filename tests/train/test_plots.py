"""The picture of a run shows its data, whatever state the files are in, and sets no global."""

import json
import sys
import warnings

import matplotlib
import matplotlib.figure
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from arcticjax.errors import DataError, ResourceError
from arcticjax.train import plots
from arcticjax.train.plots import plot_run
from arcticjax.train.result import write_result


@pytest.fixture
def figures(monkeypatch):
    """Collects the figures that are drawn."""
    drawn = []

    def keep(figure):
        drawn.append(figure)
        return FigureCanvasAgg(figure)

    monkeypatch.setattr(plots, "FigureCanvasAgg", keep)
    return drawn


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_run(directory, sources=("docs", "wiki"), steps=40, broken=()):
    directory.mkdir(exist_ok=True)
    write_lines(
        directory / "metrics.jsonl",
        [
            {"step": s, "loss": None, "non_finite": {"loss": "nan"}, "source": "docs"}
            if s in broken
            else {"step": s, "loss": 4.0 / s, "source": sources[s % len(sources)]}
            for s in range(1, steps + 1)
        ],
    )
    write_lines(
        directory / "evaluations.jsonl",
        [
            {"step": 0, "label": "before", "task": "held out", "ndcg_at_10": 0.3},
            {"step": 20, "label": 20, "task": "held out", "ndcg_at_10": 0.99},
            {"step": 20, "label": 20, "task": "held out", "ndcg_at_10": 0.35},
            {"step": 40, "label": "after", "task": "held out", "ndcg_at_10": 0.4},
            {"step": 40, "label": "after", "task": r"$\nope$", "ndcg_at_10": 0.2},
        ],
    )
    return directory


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 5000


def names(axes):
    legend = axes.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def test_draws_loss_per_source_and_ndcg_over_steps(tmp_path, figures):
    path = plot_run(write_run(tmp_path / "run", broken=(7,)))
    assert path == tmp_path / "run" / "report" / "loss_and_ndcg.png"
    assert is_picture(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    loss, ndcg = figures[0].axes
    assert names(loss) == ["wiki", "docs", "all sources", "loss not finite"] or names(loss) == [
        "docs",
        "wiki",
        "all sources",
        "loss not finite",
    ]
    points = {(x, y) for line in loss.lines for x, y in line.get_xydata()}
    assert {(s, 4.0 / s) for s in range(1, 41) if s != 7} <= points
    assert names(ndcg) == ["held out  0.300 to 0.400 (+0.100)", r"$\nope$  0.200"]
    np.testing.assert_array_equal(ndcg.lines[0].get_xydata(), [[0, 0.3], [20, 0.35], [40, 0.4]])


def test_running_mean_is_of_the_points_up_to_each():
    steps = np.arange(1.0, 9.0)
    values = np.array([1.0, 2, 3, 4, 5, 6, 7, 8])
    _, means = plots._running_mean(steps, values)
    np.testing.assert_allclose(means, [1, 1.5, 2, 2.5, 3, 4, 5, 6])  # five points wide


def test_long_series_are_thinned_without_losing_their_mean():
    steps, values = np.arange(10_001.0), np.random.default_rng(0).standard_normal(10_001)
    few_steps, few_values = plots._binned(steps, values)
    assert len(few_steps) == len(few_values) <= plots.MOST_POINTS
    size = -(-len(values) // plots.MOST_POINTS)
    np.testing.assert_allclose(few_values[3], values[3 * size : 4 * size].mean())
    np.testing.assert_allclose(few_steps[-1], steps[(len(few_steps) - 1) * size :].mean())


def test_many_sources_share_one_grey(tmp_path, figures):
    plot_run(write_run(tmp_path / "run", sources=[f"s{i:02}" for i in range(12)], steps=120))
    assert names(figures[0].axes[0])[-2:] == ["5 more sources", "all sources"]
    assert len(names(figures[0].axes[0])) == plots.MOST_SOURCES + 2


def test_torn_and_foreign_files_are_drawn_as_far_as_they_go(tmp_path, figures):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\x00\xff\n[]\n{"step": 41, "loss": "high"}\n{"step": 42, "source": 3}\n{"st')
    with (run / "evaluations.jsonl").open("ab") as file:
        file.write(b'{"step": 1}\n{"step": 2, "label": [], "task": "x"}\n{"step": 3, "label"')
    assert is_picture(plot_run(run))
    assert names(figures[0].axes[0])[-1] == "all sources"
    assert len(names(figures[0].axes[1])) == 2


def test_empty_runs_say_so_and_absent_ones_are_refused(tmp_path, figures):
    assert is_picture(plot_run(tmp_path))
    said = [[text.get_text() for text in axes.texts] for axes in figures[0].axes]
    assert said == [["no logged steps"], ["no evaluations"]]
    with pytest.raises(DataError, match="does not exist"):
        plot_run(tmp_path / "absent")
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "report").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        plot_run(tmp_path / "blocked")


def test_evaluations_come_from_the_result_where_their_own_file_is_gone(tmp_path, figures):
    run = write_run(tmp_path / "run")
    (run / "evaluations.jsonl").unlink()
    (run / "result.json").write_text('{"status"')
    plot_run(run)
    assert names(figures[0].axes[1]) == []
    write_result(
        run,
        status="done",
        steps=40,
        pairs=1,
        seconds=1.0,
        seconds_to_first_step=None,
        pairs_per_second=None,
        tokens_per_second=None,
        fill=None,
        compiled_shapes=[],
        peak_memory_bytes=None,
        evaluations={
            "before": {"t": {"ndcg_at_10": 0.25}},
            "20": {"t": {"ndcg_at_10": 0.5}},
            "after": {"t": {"ndcg_at_10": 0.75}},
            "odd": {"t": {"ndcg_at_10": 0.9}},
        },
        export=None,
    )
    plot_run(run)
    np.testing.assert_array_equal(
        figures[1].axes[1].lines[0].get_xydata(), [[0, 0.25], [20, 0.5], [40, 0.75]]
    )


def test_names_in_other_scripts_and_with_mathematics_are_drawn_without_a_warning(tmp_path):
    run = write_run(tmp_path / "東大寺 $x_", sources=("仏像", "$a$", "_hidden"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_picture(plot_run(run))


def test_no_matplotlib_global_is_touched(tmp_path):
    before = dict(matplotlib.rcParams)
    had_pyplot = "matplotlib.pyplot" in sys.modules
    plot_run(write_run(tmp_path / "run"))
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot
