"""Mining end to end: equal to brute force, on any devices, through kills, and refusing changes."""

import signal
import time

import numpy as np
import pyarrow.parquet
import pytest

import arcticjax
from arcticjax.data import candidates
from arcticjax.data.stored import text_id
from arcticjax.errors import CheckpointError, ConfigError
from arcticjax.mine import run
from launch.local import environments
from tests import tiny
from tests.mine import making

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quick_compiler):
    """Inputs, and the candidates of one device in `out`."""
    folder = tmp_path_factory.mktemp("mine")
    making.mine(folder, "out")
    return folder


def brute_force(folder, queries, documents, positives):
    """For each query its candidates and positives as (id, score), from single vectors and one sort.

    queries, documents: {id: text}; positives: {query id: document ids}.
    """
    teacher = arcticjax.load(folder / "model")
    # The prompt of the config, put before the text by hand.
    query_vectors = teacher.encode([f"river stone {text}" for text in queries.values()], "query")
    document_ids = sorted(documents)
    document_vectors = teacher.encode([documents[one] for one in document_ids])
    scores = query_vectors.astype(np.float64) @ document_vectors.astype(np.float64).T
    found = {}
    for row, (query, text) in zip(scores, queries.items(), strict=True):
        order = np.argsort(-row, kind="stable")
        best = [(document_ids[place], row[place]) for place in order[: making.TOP_K]]
        own = positives[query]
        found[query] = (
            [hit for hit in best if hit[0] not in own and documents[hit[0]] != text],
            [(document_ids[place], row[place]) for place in order if document_ids[place] in own],
        )
    return found


def check(found, wanted):
    """Ids and scores agree; neighbours whose scores differ by rounding may have changed places."""
    assert found.query_ids.tolist() == sorted(wanted)
    for number, query in enumerate(found.query_ids.tolist()):
        for side, expected in zip(("candidate", "positive"), wanted[query], strict=True):
            starts = getattr(found, f"{side}_starts")
            part = slice(starts[number], starts[number + 1])
            ids = getattr(found, f"{side}_ids")[part].tolist()
            scores = getattr(found, f"{side}_scores")[part]
            np.testing.assert_allclose(scores, [score for _, score in expected], atol=2e-6)
            assert np.all(np.diff(scores) <= 0)
            assert sorted(ids) == sorted(one for one, _ in expected)


def test_equals_brute_force_on_pairs(folder):
    opened = candidates.open_candidates(folder / "out", verify=True)
    pairs = tiny.pairs(0, 60)
    queries = {text_id(query): query for query, _ in pairs}
    documents = {text_id(document): document for _, document in pairs}
    positives = {text_id(query): {text_id(document)} for query, document in pairs}
    group = opened.group_of("a")
    assert (group.kind, group.queries, group.documents) == ("text", 60, 60)
    check(opened.read(group), brute_force(folder, queries, documents, positives))


def test_equals_brute_force_on_a_beir_folder(folder):
    opened = candidates.open_candidates(folder / "out")
    made = tiny.pairs(9, 40)
    queries = {f"q{n:02d}": query for n, (query, _) in enumerate(made)}
    documents = {f"d{n:02d}": document for n, (_, document) in enumerate(made)}
    positives = {f"q{n:02d}": {f"d{n:02d}"} for n in range(40)}
    # Equal documents go by the first id, equal queries share positives, and a query's own text is
    # no candidate.
    documents["c-copy"] = documents.pop("d03")
    documents["x-query"] = queries["q05"]
    positives["q03"] = {"c-copy"}
    queries["q-twin"] = queries["q07"]
    positives["q07"] = positives["q-twin"] = {"d07", "d08"}
    group = opened.group_of("task")
    assert (group.kind, group.queries, group.documents) == ("own", 41, 41)
    found = opened.read(group)
    check(found, brute_force(folder, queries, documents, positives))
    assert "d03" not in set(found.candidate_ids.tolist())


def test_columns_and_manifest_are_the_contract(folder):
    paths = sorted((folder / "out").glob("candidates-*.parquet"))
    assert [path.name for path in paths] == [
        *(f"candidates-a-{n:05d}.parquet" for n in range(4)),
        *(f"candidates-task-{n:05d}.parquet" for n in range(3)),
    ]
    for path in paths:
        assert pyarrow.parquet.read_schema(path).names == [
            "query_id",
            "candidate_ids",
            "candidate_scores",
            "positive_ids",
            "positive_scores",
        ]
    manifest = candidates.open_candidates(folder / "out").manifest
    assert manifest["teacher"]["contract"]["query_prompt"] == "river stone "
    assert (manifest["top_k"], manifest["corpus"]) == (making.TOP_K, "own")
    assert (folder / "out" / "report" / "report.html").exists()


@pytest.mark.parametrize("changes", [{"mesh": {"data": 8}}, {"document_block": 17}])
def test_devices_and_blocks_change_nothing(folder, changes):
    output = making.mine(folder, f"out-{next(iter(changes))}", **changes)
    assert making.files(output) == making.files(folder / "out")
    assert not (output / "search" / "a").exists()


def test_two_processes_give_the_same_files(folder):
    file = making.config_file(folder, output=str(folder / "out-two"), mesh={"data": "auto"})
    processes = [
        making.start(file, devices=2, environment=environment) for environment in environments(2)
    ]
    first, second = (making.finish(process) for process in processes)
    assert making.files(folder / "out-two") == making.files(folder / "out")
    assert "candidates of 101 queries" in first
    assert "candidates of" not in second


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other(folder):
    output = folder / "out-killed"
    changes = {"shard": 1, "input": str(folder / "a.parquet"), "output": str(output)}
    file = making.config_file(folder, mesh={"data": "auto", "peer_seconds": 3}, **changes)
    first, second = (making.start(file, environment=one) for one in environments(2))
    wait_for(1, "embeddings/a-document-*.npy", output, first)
    second.kill()
    second.communicate()
    assert "no sign of life from process 1 of 2" in making.finish(first, 141).splitlines()[-1]
    assert "Thread" in (output / "stacks_process_0.txt").read_text()


def wait_for(count, pattern, output, process):
    """Until so many files are there, while the process runs."""
    deadline = time.monotonic() + 120
    while len(list(output.glob(pattern))) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(
    "pattern, how, code",
    [
        pytest.param(
            "embeddings/a-document-*.npy", signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow
        ),
        ("candidates-a-*.parquet", signal.SIGTERM, 42),
    ],
)
def test_a_stopped_run_goes_on(folder, pattern, how, code):
    """By default only of a run told to stop: a killed one finds the same whole files."""
    output = folder / f"out-{how.name}"
    # Shards of one query: enough of them that none of the waits comes too late.
    changes = {"output": str(output), "shard": 1, "input": str(folder / "a.parquet")}
    process = making.start(making.config_file(folder, **changes))
    wait_for(3, pattern, output, process)
    process.send_signal(how)
    said = making.finish(process, code)
    if how == signal.SIGTERM:
        assert "shard(s) of embeddings" in said.splitlines()[-1]
    assert not (output / "manifest.json").exists()
    times = {path: path.stat().st_mtime_ns for path in output.glob(pattern)}
    assert 3 <= len(times) < 60

    run.run(making.config(folder, **changes))
    assert {path: path.stat().st_mtime_ns for path in times} == times
    whole, straight = (candidates.open_candidates(one) for one in (output, folder / "out"))
    left, right = whole.read(whole.groups[0]), straight.read(straight.group_of("a"))
    for name, value in vars(left).items():
        if value.dtype == np.float32:
            np.testing.assert_allclose(value, getattr(right, name), atol=2e-6)
        else:
            np.testing.assert_array_equal(value, getattr(right, name))


def test_changed_inputs_are_refused_by_name(folder, tmp_path):
    def refused(message, **changes):
        with pytest.raises(ConfigError, match=message):
            making.mine(folder, "out", **changes)

    before = making.files(folder / "out")
    refused("top_k: 12 in the folder, 7 now", top_k=7)
    refused("contract.query_prompt: 'river stone ' in the folder, '' now", contract={})
    refused("precision: 'float32' in the folder, 'bfloat16' now", precision="bfloat16")
    other = tiny.model_folder(tmp_path / "other", seed=1)
    refused("teacher: 'sha256 ", teacher=str(other))
    tiny.parquet(tmp_path / "a.parquet", 0, 61)
    task = {"name": "task", "path": f"beir:{folder / 'task'}"}
    refused(r"input\.a: 'sha256 ", input=[{"name": "a", "path": str(tmp_path / "a.parquet")}, task])
    refused(r"input\.a: 'sha256 .* 'absent' now", input=[task])
    assert making.files(folder / "out") == before
    # What does not change the results may change, and a finished folder is left alone.
    making.mine(folder, "out", mesh={"data": 2}, document_block=5)
    assert making.files(folder / "out") == before


def test_pairs_are_compared_with_a_larger_corpus(folder):
    """Positives are part of it though it does not list them; a text in both counts once."""
    larger = [document for _, document in (*tiny.pairs(2, 30), tiny.pairs(0, 60)[7])]
    table = pyarrow.table({"body": [*larger, larger[0]]})
    pyarrow.parquet.write_table(table, folder / "larger.parquet")
    one = {"name": "a", "path": str(folder / "a.parquet"), "corpus_column": "body"}
    one["corpus"] = str(folder / "larger.parquet")
    opened = candidates.open_candidates(making.mine(folder, "out-larger", input=[one]))
    pairs = tiny.pairs(0, 60)
    queries = {text_id(query): query for query, _ in pairs}
    documents = {text_id(text): text for text in (*larger, *(text for _, text in pairs))}
    positives = {text_id(query): {text_id(document)} for query, document in pairs}
    (group,) = opened.groups
    assert (group.queries, group.documents) == (60, 90)
    check(opened.read(group), brute_force(folder, queries, documents, positives))


def test_a_union_is_one_group(folder):
    tiny.parquet(folder / "b.parquet", 1, 20, longest=8)
    both = [{"name": name, "path": str(folder / f"{name}.parquet")} for name in ("a", "b")]
    opened = candidates.open_candidates(
        making.mine(folder, "out-union", input=both, corpus="union")
    )
    (group,) = opened.groups
    assert (group.name, group.sources, group.documents) == ("union", ("a", "b"), 80)
    assert opened.group_of("b") is group
    pairs = [*tiny.pairs(0, 60), *tiny.pairs(1, 20, longest=8)]
    positives = {text_id(query): {text_id(document)} for query, document in pairs}
    queries = {text_id(query): query for query, _ in pairs}
    documents = {text_id(document): document for _, document in pairs}
    check(opened.read(group), brute_force(folder, queries, documents, positives))


def test_mistakes(folder, tmp_path):
    with pytest.raises(ConfigError, match="runs through a file"):
        making.mine(folder, "a.parquet/out")
    with pytest.raises(ConfigError, match=r"contract\.query_length: 100 tokens, but .* 64 at most"):
        making.mine(folder, "out-long", contract={"query_length": 100})
    with pytest.raises((ConfigError, CheckpointError)):
        making.mine(folder, "out-none", teacher=str(tmp_path))
