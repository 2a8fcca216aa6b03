"""What the training step must equal, in plain parts: padded texts, labels from ids."""

import numpy as np

from arcticjax.losses import Labels


def padded(texts, template):
    """Tokens, starts and lengths of one text a row."""
    tokens = np.zeros((len(texts), template.longest), np.int32)
    lengths = np.zeros((len(texts), 1), np.int32)
    for row, text in enumerate(texts):
        own = text[: template.longest - template.overhead]
        whole = [*template.head, *own, template.end_id]
        tokens[row, : len(whole)] = whole
        lengths[row] = len(whole)
    return tokens, np.zeros_like(lengths), lengths


def read(builder, step):
    """(queries, documents, labels) of a batch: each distinct document once, the columns left over
    empty."""
    drawn = builder.draw.at(step)
    view = builder.views[drawn.source]
    queries, documents = view.read(drawn.records)
    document_ids = view.document_ids(drawn.records)
    _, first, column = np.unique(document_ids, return_index=True, return_inverse=True)
    groups = union(view.query_ids(drawn.records), document_ids)
    columns = np.full(len(documents), -1)
    columns[: len(first)] = groups[first]
    once = [documents[i] for i in first] + [documents[0]] * (len(documents) - len(first))
    labels = Labels(*(np.asarray(x, np.int32) for x in (column[:, None], groups, columns)))
    return queries, once, labels


def union(query_ids, document_ids):
    """Connected components by plain relabelling."""
    groups = np.arange(len(query_ids))
    for _ in range(len(groups)):
        for ids in (query_ids, document_ids):
            for one in np.unique(ids):
                groups[ids == one] = groups[ids == one].min()
    return groups
