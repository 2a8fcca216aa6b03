"""Search in blocks and shards, against a sorted score matrix, ties included."""

import jax
import numpy as np
import pytest

from arcticjax.data import candidates
from arcticjax.mine.inputs import Pool
from arcticjax.mine.search import Search, block_size
from arcticjax.mine.vectors import Vectors
from arcticjax.parallel import mesh as meshes
from arcticjax.step.search import fitting

pytestmark = pytest.mark.usefixtures("quick_compiler")
QUERIES, DOCUMENTS, WIDTH, SHARD = 23, 301, 6, 10


class Ids:
    """Texts of which only the ids matter; they ascend by more than one."""

    def __init__(self, count):
        self.ids = np.arange(count, dtype=np.uint64) * np.uint64(7) + np.uint64(2**63)

    def __len__(self):
        return len(self.ids)


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """Small whole numbers: every score is exact, and many are equal."""
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("vectors")
    arrays = {}
    for name, count in (("query", QUERIES), ("document", DOCUMENTS)):
        array = random.integers(-2, 3, (count, WIDTH)).astype(np.float32)
        vectors = Vectors(folder, name, count, SHARD, WIDTH)
        for shard in range(vectors.shards):
            vectors.write(shard, array[vectors.places(shard)])
        assert not vectors.missing()
        arrays[name] = array, vectors
    rows = [np.unique(random.integers(0, DOCUMENTS, 1 + query % 3)) for query in range(QUERIES)]
    own = np.where(np.arange(QUERIES) % 4 == 0, random.integers(0, DOCUMENTS, QUERIES), -1)
    pool = Pool(
        name="p",
        sources=("p",),
        kind="text",
        queries=Ids(QUERIES),
        documents=Ids(DOCUMENTS),
        positives=np.concatenate(rows),
        positive_starts=np.concatenate([[0], np.cumsum([len(row) for row in rows])]),
        own_Q=own,
        fingerprint="",
    )
    return arrays, pool


def searched(problem, output, *, top_k, block, devices):
    arrays, pool = problem
    mesh = meshes.make_mesh(devices)
    search = Search(
        pool, arrays["query"][1], arrays["document"][1], output, output / "pieces", top_k, block,
        mesh,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        done = sum(search.run())
    assert done == QUERIES * len(search.blocks)
    names = [search.file(shard) for shard in range(search.queries.shards)]
    assert sorted(output.iterdir()) == names
    opened = candidates.CandidateFolder(output, {"top_k": top_k, "groups": [], "files": {}})
    group = candidates.Group("p", ("p",), "text", 0, 0, "", tuple(path.name for path in names))
    return opened.read(group)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("top_k, block", [(20, DOCUMENTS), (20, 64), (64, 17), (1000, 100)])
def test_equals_brute_force(problem, tmp_path, devices, top_k, block):
    found = searched(problem, tmp_path, top_k=top_k, block=block, devices=devices)
    arrays, pool = problem
    scores = arrays["query"][0] @ arrays["document"][0].T
    for query in range(QUERIES):
        positives = pool.positives[slice(*pool.positive_starts[query : query + 2])]
        order = np.argsort(-scores[query], kind="stable")  # ties by place, hence by id
        best = [
            place
            for place in order[:top_k]
            if place not in positives and place != pool.own_Q[query]
        ]
        for places, side in ((best, "candidate"), (order[np.isin(order, positives)], "positive")):
            part = slice(*getattr(found, f"{side}_starts")[query : query + 2])
            np.testing.assert_array_equal(
                getattr(found, f"{side}_ids")[part], pool.documents.ids[places]
            )
            np.testing.assert_array_equal(
                getattr(found, f"{side}_scores")[part], scores[query, places]
            )


def test_a_kept_piece_is_not_searched_again(problem, tmp_path):
    arrays, pool = problem
    mesh = meshes.make_mesh(1)
    search = Search(
        pool, arrays["query"][1], arrays["document"][1], tmp_path, tmp_path / "pieces", 9, 100, mesh
    )
    with jax.set_mesh(mesh):
        running = search.run()
        for _ in range(4):  # one block of three shards, and one shard of the next
            next(running)
        running.close()
        assert [len(search.missing(block)) for block in range(4)] == [0, 2, 3, 3]
        assert sum(search.run()) == 4 * QUERIES - 2 * SHARD - 3 - SHARD
    assert not search.missing(0) and not (tmp_path / "pieces").exists()


def test_block_size():
    assert fitting(memory=3000, dimension=5, devices=8) == 600
    assert block_size(70, 100, 5, 1) == 70
    assert block_size(700, 100, 5, 1) == 100
    assert block_size(None, 100, 5, 1) == 100


def test_vectors_are_read_across_shards(problem):
    arrays, _ = problem
    array, vectors = arrays["document"]
    np.testing.assert_array_equal(vectors.read(7, 33), array[7:33])
    np.testing.assert_array_equal(vectors.take(np.array([300, 0, 15, 0])), array[[300, 0, 15, 0]])
