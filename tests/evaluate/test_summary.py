"""Rows of the report: folding, means, intervals, and what they are compared with."""

import dataclasses
import json
import re

import numpy as np
import pytest

from arcticjax.evaluate import report
from arcticjax.evaluate.records import Identity, Record
from arcticjax.evaluate.summary import compare, sizes, summarize
from arcticjax.scoring import benchmarks, published
from arcticjax.scoring.compression import FULL, Compression

KINDS = [FULL, Compression.parse("int8"), Compression.parse("int4")]
GOLDEN = {str(kind): published.BY_TASK[f"arctic-embed-m-v1.5, 256 x {kind}"] for kind in KINDS}


def record(task, by_kind, parts=1):
    """A task of which ten queries score around its golden values."""
    spread = np.linspace(-0.05, 0.05, 10)
    values = {kind: (np.float64(value) + spread).tolist() for kind, value in by_kind.items()}
    return Record(
        Identity(task, "0" * 40, "data", list(by_kind)),
        {"ndcg_at_10": by_kind["float32"], "mrr_at_10": 0.5, "recall_at_100": 0.9},
        {f"test/{n}": values for n in range(parts)},
        100,
        10,
        1.5,
    )


@pytest.fixture(scope="module")
def records():
    """The 26 tasks of the protocol, scored as published."""
    return [
        record(task, {kind: scores[score] for kind, scores in GOLDEN.items()})
        for score, tasks in benchmarks.RETRIEVAL_15.items()
        for task in tasks
    ]


@pytest.fixture(scope="module")
def summary(records):
    return summarize(records)


def test_26_tasks_are_15_rows_and_their_published_mean(summary):
    assert [row.name for row in summary.rows] == list(benchmarks.RETRIEVAL_15)
    [mean] = summary.means.values()
    assert mean.name == "MTEB retrieval (15)"
    assert abs(mean.metrics["ndcg_at_10"] - 0.54234) < 1e-5
    assert abs(mean.compressed["int8"] - 0.54275) < 1e-5
    assert abs(mean.compressed["int4"] - 0.53729) < 1e-5
    assert mean.queries == 260 and mean.seconds == 26 * 1.5


def test_intervals_shrink_with_tasks(summary):
    single = next(row for row in summary.rows if row.name == "NFCorpus").interval
    folded = next(row for row in summary.rows if row.name == "CQADupstackRetrieval").interval
    [mean] = [row.interval for row in summary.means.values()]
    widths = [high - low for low, high in (single, folded, mean)]
    assert single[0] < 0.35799 < single[1]
    assert widths[0] > 2 * widths[1] > 0 and widths[0] > 2 * widths[2] > 0


def test_scores_stand_beside_published_ones(summary):
    comparison = compare(summary, 33_000_000)
    assert set(comparison.means) == set(published.MEANS)
    about = report.About("m", "0" * 40, 256, KINDS, [], {}, {}, 33_000_000, 512)
    tables = report.make_tables(about, summary, comparison)
    beside = next(table for table in tables if table.title.startswith("Beside published nDCG"))
    assert "Not the published protocol" not in beside.title
    column = beside.head.index("NFCorpus")
    ours, *others = beside.rows
    assert ours[:2] == ["ours", "33 M"] and ours[column].startswith("0.3580 [0.")
    row = next(row for row in others if row[0] == "arctic-embed-m-v1.5, 256 x float32")
    assert row[1] == "109 M" and row[column].startswith("0.3580 (+0.000")
    cut = report.make_tables(dataclasses.replace(about, length=256), summary, comparison)
    assert any("texts were cut at 256 tokens here, it cuts at 512" in one.title for one in cut)
    means = next(table for table in tables if table.title.startswith("Beside published means"))
    assert ["arctic-embed-l", "0.5598", "-0.0175"] in means.rows


def test_models_of_the_same_size_come_first(summary):
    order = list(compare(summary, 33_000_000).by_task)
    assert {published.SIZES[model] for model in order[:5]} == {33}
    assert order[0] == "arctic-embed-s"
    assert next(iter(compare(summary, 600_000_000).by_task)) == "arctic-embed-l-v2.0"
    assert [published.SIZES[model] for model in order[-2:]] == [None, None]


def test_a_part_of_the_fifteen_has_no_means_beside(records):
    some = summarize(records[:1])
    assert not some.means
    comparison = compare(some, 100_000_000)
    assert set(comparison.by_task["arctic-embed-m"]) == {"ArguAna"} and not comparison.means
    assert compare(summarize([record("mine", {"float32": 0.4})]), 1) is None


def test_subsets_count_alike():
    one = record("task", {"float32": 0.4}, parts=1)
    other = {"test/b": {"float32": [0.6] * 1000}}
    mixed = Record(one.identity, one.metrics, one.values | other, 1, 1, 1.0)
    assert abs(summarize([mixed]).rows[0].compressed["float32"] - 0.5) < 1e-9


def test_sizes_go_from_large_to_small():
    kinds = [FULL, Compression.parse("int4@128"), Compression.parse("int8")]
    found = sizes(kinds, 384, {"float32": 0.5, "int4@128": 0.3, "int8": 0.49})
    assert found == [
        ("float32", 384, 1536, 0.5),
        ("int8", 384, 384, 0.49),
        ("int4@128", 128, 64, 0.3),
    ]


def test_files_of_a_report(tmp_path, records):
    about = report.About(
        "runs/a|<b>",
        "f" * 40,
        256,
        KINDS,
        [("prompts", "query 'q: '")],
        {"weights_sha256": "a" * 64},
        {"NFCorpus": {"path": "mteb/nfcorpus"}},
        109_000_000,
        512,
    )
    other = Record(Identity("STS", "f" * 40, "d", []), {"main_score": 0.7}, {}, 0, 0, 2.0)
    report.write(tmp_path, about, [*records, other])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["NFCorpus"]["ndcg_at_10"] == 0.35799
    assert abs(results["CQADupstackRetrieval"]["ndcg_at_10"] - 0.4421) < 1e-6
    assert results["STS"] == {"main_score": 0.7}
    assert results["model"] == "runs/a|<b>" and results["revision"] == "f" * 40
    assert results["seconds"] == 26 * 1.5 + 2
    page = (tmp_path / "report.html").read_text()
    assert "runs/a|&lt;b&gt;" in page and "<b>" not in page
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is fetched
    text = (tmp_path / "report.md").read_text()
    assert "runs/a\\|<b>" in text
    for line in text.splitlines():
        if line.startswith("| int4 |"):
            assert line == "| int4 | 256 | 128 | 8.39 M | 0.5373 | 99.1 % |"
            break
    else:
        raise AssertionError("no row of int4")
    for name in (report.SCORES_PLOT, report.SIZES_PLOT):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in text
    details = json.loads((tmp_path / "report.json").read_text())
    assert details["bytes_per_vector"] == {"float32": 1024, "int8": 256, "int4": 128}
    assert len(details["scores"]["NFCorpus"]["interval"]) == 2
    assert details["encoder"] == {"weights_sha256": "a" * 64}
    assert len(details["tasks"]) == 27 and "CQADupstackRetrieval" not in details["tasks"]
    nfcorpus = details["tasks"]["NFCorpus"]
    assert nfcorpus["dataset"] == {"path": "mteb/nfcorpus"}
    assert nfcorpus["metrics"]["ndcg_at_10"] == 0.35799 and set(nfcorpus["compressed"]) == {
        *("float32", "int8", "int4")
    }
    assert details["tasks"]["STS"] == {
        "metrics": {"main_score": 0.7},
        "compressed": {},
        "dataset": None,
    }
