"""The benchmark of the loss: all its sides compute the same, and only one is exact."""

import pytest

from benchmarks import loss

WIDTH = 32
# Those of sentence-transformers take half a minute to import.
SIDES = ("tiled", "jax naive", "torch naive")


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "ERROR_BATCH", 128)
        yield


def test_sides_agree_and_only_the_tiled_one_stays_exact_when_pairs_are_separated():
    rows = loss.error_rows(WIDTH, SIDES, "float32", gpu=False)
    error = {(row["regime"], row["side"]): row["gradient_error"] for row in rows}
    assert len(error) == 2 * len(SIDES)
    for side in SIDES:
        assert error["ordinary", side] < 1e-5
    assert error["saturated", "tiled"] < 1e-5


def test_a_side_that_is_wrong_shows():
    texts = loss.embeddings(64, WIDTH)
    call, read = loss.prepared("tiled", *texts, 0.05, "float32")
    assert loss.relative_error(read(call()), loss.exact(*texts, 0.06)) > 1e-2


def test_temporaries_of_the_naive_loss_grow_with_the_square_and_of_the_tiled_do_not():
    found = {}
    for batch in (2048, 4096):
        sides = ("tiled", "jax naive")
        for row in loss.memory_rows(batch, WIDTH, sides, "float32", runs=False, gpu=False):
            found[batch, row["side"]] = row["temporaries_mib"]
    assert found[4096, "jax naive"] > 3.9 * found[2048, "jax naive"] > 60
    assert found[4096, "tiled"] < 2.1 * found[2048, "tiled"] < 60


def test_timed_rows_tell_how_far_sides_are_apart():
    rows = loss.time_rows(64, WIDTH, ("tiled", "torch naive"), 1, "float32", gpu=False)
    assert [row["side"] for row in rows] == ["tiled", "torch naive"]
    assert rows[0]["from_tiled"] == 0 and rows[1]["from_tiled"] < 1e-5
    assert rows[1]["times_tiled_cpu"] > 0
