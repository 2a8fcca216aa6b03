"""Lists that several layouts of files can hold, and what was read of them."""

from __future__ import annotations

import numpy as np

from arcticjax.config.negatives import NegativesConfig
from arcticjax.data.policy import Policy
from tests import tiny

QUERIES = ["river stone", "cloud ember", "violin harbour"]
DOCUMENTS = ["meadow copper", "thistle falcon", "glacier orchard", "pepper quartz", "saddle timber"]
EXPECTED = {
    QUERIES[0]: ([DOCUMENTS[0]], [DOCUMENTS[1], DOCUMENTS[2]]),
    QUERIES[1]: ([DOCUMENTS[1], DOCUMENTS[3]], [DOCUMENTS[4], DOCUMENTS[0]]),
}


def texts(found, tokenizer):
    """{query: (its positives, its candidates)} as texts."""
    words = {tokenizer.encode([word])[0][0]: word for word in tiny.WORDS}

    def text(tokens):
        return " ".join(words[token] for token in tokens.tolist())

    documents = [text(one) for one in found.documents(np.arange(len(found.document_ids)))]
    rows = found.lists(np.arange(len(found)))
    return {
        text(query): (
            [documents[one] for one in positives if one >= 0],
            [documents[one] for one in ids if one >= 0],
        )
        for query, positives, ids in zip(
            found.queries(np.arange(len(found))), rows.positives_QP, rows.ids_QK, strict=True
        )
    }


def policy(positives=1, seed=0, **fields):
    return Policy.from_config(NegativesConfig(**fields), positives, seed)
