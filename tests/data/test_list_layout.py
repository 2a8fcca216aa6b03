"""Queries with several documents dealt to devices: labels lead to the right texts."""

import numpy as np
import pytest

from arcticjax.data.list_layout import deal_lists

QUERIES, WIDTH, DOCUMENTS = 24, 4, 40


def problem(seed=0):
    """Query ids (some repeat), documents of each query (some missing, many shared), documents that
    answer it (the first two named, and one more), lengths."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, 20, QUERIES)
    documents = np.stack([random.permutation(DOCUMENTS)[:WIDTH] for _ in range(QUERIES)])
    documents[random.random(documents.shape) < 0.15] = -1
    documents[:, 0] = random.integers(0, DOCUMENTS, QUERIES)
    named = np.unique(documents[documents >= 0])
    documents = np.where(documents >= 0, np.searchsorted(named, documents), -1)
    extra = random.integers(0, len(named), (QUERIES, 1))
    known = np.concatenate(
        [documents[:, :1], np.where(random.random(extra.shape) < 0.3, extra, -1)], 1
    )
    return (
        ids,
        documents,
        known,
        random.integers(3, 20, QUERIES),
        random.integers(3, 60, len(named)),
    )


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("shared", [False, True])
def test_labels_lead_to_the_documents_of_the_query(devices, shared):
    ids, documents, known, query_lengths, lengths = problem()
    dealt = deal_lists(ids, documents, known, query_lengths, lengths, devices, shared=shared)
    assert sorted(dealt.queries_Nb.reshape(-1).tolist()) == list(range(QUERIES))
    room = QUERIES // devices * WIDTH
    for device in range(devices):
        assert len(dealt.documents[device]) <= room
        for slot, query in enumerate(dealt.queries_Nb[device]):
            for label, document in zip(
                dealt.labels_NbC[device, slot], documents[query], strict=True
            ):
                if document < 0:
                    assert label == -1
                    continue
                owner, place = divmod(int(label), room) if shared else (device, int(label))
                assert dealt.documents[owner][place] == document


def test_a_shared_document_is_encoded_once():
    ids, documents, known, query_lengths, lengths = problem()
    dealt = deal_lists(ids, documents, known, query_lengths, lengths, 4, shared=True)
    everywhere = np.concatenate(dealt.documents)
    assert sorted(everywhere.tolist()) == np.unique(documents[documents >= 0]).tolist()


def test_own_documents_are_encoded_once_a_device():
    ids, documents, known, query_lengths, lengths = problem()
    dealt = deal_lists(ids, documents, known, query_lengths, lengths, 4, shared=False)
    assert dealt.row_groups_Nb is None
    for queries, own in zip(dealt.queries_Nb, dealt.documents, strict=True):
        named = documents[queries]
        assert own.tolist() == np.unique(named[named >= 0]).tolist()


def test_known_answers_are_of_the_querys_group_also_as_anothers_negatives():
    """Query 1's hard negative (document 0) is known to answer query 0: nobody else's group."""
    ids = np.array([7, 8, 9, 7])
    documents = np.array([[1, 2], [3, 0], [4, -1], [5, -1]])
    known = np.array([[1, 0], [3, -1], [4, -1], [5, -1]])
    dealt = deal_lists(ids, documents, known, np.full(4, 3), np.full(6, 3), 2, shared=True)
    assert dealt.row_groups_Nb is not None and dealt.column_groups_NW is not None
    row = np.empty(4, int)
    row[dealt.queries_Nb] = dealt.row_groups_Nb
    column = np.empty(6, int)
    for device, own in enumerate(dealt.documents):
        column[own] = dealt.column_groups_NW[device, : len(own)]
        assert (dealt.column_groups_NW[device, len(own) :] == -1).all()
    # Queries 0 and 3 are one text.
    assert row[0] == column[1] == column[0] == row[3] == column[5]
    assert row[1] == column[3] and row[2] == column[4]
    assert len({row[0], row[1], row[2], column[2]}) == 4


def test_devices_get_nearly_the_same():
    random = np.random.default_rng(1)
    documents = np.arange(512 * 4).reshape(512, 4)
    lengths = random.integers(5, 300, 2048)
    queries = random.integers(3, 20, 512)
    dealt = deal_lists(
        np.arange(512), documents, documents[:, :1], queries, lengths, 8, shared=False
    )
    loads = [
        queries[own].sum() + lengths[texts].sum()
        for own, texts in zip(dealt.queries_Nb, dealt.documents, strict=True)
    ]
    assert max(loads) / np.mean(loads) < 1.02


def test_queries_that_do_not_divide():
    with pytest.raises(ValueError, match="24 queries do not divide among 5"):
        ids, documents, known, query_lengths, lengths = problem()
        deal_lists(ids, documents, known, query_lengths, lengths, 5, shared=True)
