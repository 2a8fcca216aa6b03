"""The encoder as MTEB asks for one: it encodes and searches on the mesh, without torch.

Needs the extra `eval`:

    mteb.evaluate(MtebEncoder(arcticjax.load("RUN")), mteb.get_tasks(tasks=["NFCorpus"]))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from mteb.models import ModelMeta, SearchEncoderWrapper
from mteb.models.model_meta import ScoringFunction

from arcticjax.scoring.compression import FULL, Compression
from arcticjax.scoring.metrics import RECALL_DEPTH
from arcticjax.scoring.retrieve import Ranking, rank
from arcticjax.step.embedder import Embedder, Side

# Texts that are tokenised and packed together, and documents that are searched at once.
CHUNK = 131_072
# Both sides are questions, and are encoded as such (the published protocol).
SYMMETRIC = frozenset(
    {
        "QuoraRetrieval",
        "QuoraRetrievalHardNegatives",
        "QuoraRetrievalHardNegatives.v2",
        "NanoQuoraRetrieval",
    }
)


class MtebEncoder:
    """Speaks MTEB's encoder protocol, and its search protocol for retrieval tasks.

    name: what results are filed under, as `owner/model`. The revision is the embedder's
    fingerprint: a cache of results cannot answer for other weights, prompts or lengths.
    compressions: forms in which the vectors of a retrieval task are searched, all from one
    encoding. MTEB is given the first one's ranking; `rankings` has all, by (split, subset), as
    query id -> [(document id, score)], best first, of the others as many as metrics need.
    encoded: as `Embedder.encode` takes it.
    """

    def __init__(
        self,
        embedder: Embedder,
        name: str = "arcticjax/encoder",
        *,
        compressions: Sequence[Compression] = (FULL,),
        chunk: int = CHUNK,
        encoded: Callable[[int], None] | None = None,
    ) -> None:
        self.rankings: dict[tuple[str, str], dict[Compression, Ranking]] = {}
        self._embedder = embedder
        self._compressions = tuple(compressions)
        self._chunk = chunk
        self._encoded = encoded
        self._corpus: Any = None
        revision = embedder.fingerprint()
        if self._compressions[0] != FULL:
            revision += f"-{self._compressions[0]}"
        self._meta = ModelMeta.create_empty(
            {
                "name": _owned(name),
                "revision": revision,
                "embed_dim": self._compressions[0].dimension or embedder.dimension,
                "max_tokens": embedder.contract.document_length,
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": bool(embedder.contract.query_prompt),
            }
        )

    @property
    def mteb_model_meta(self) -> ModelMeta:
        return self._meta

    def encode(
        self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **options: Any
    ) -> np.ndarray:
        """Unit vectors float32 [texts, D] of all batches of a data loader, in order. Texts of a
        task that has no queries are documents."""
        texts = [text for batch in inputs for text in batch["text"]]
        side = _side(task_metadata.name, prompt_type)
        chunks = [
            self._embed(texts[first : first + self._chunk], side)
            for first in range(0, len(texts), self._chunk)
        ]
        return np.concatenate(chunks) if chunks else self._embed([], side)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines [len(embeddings1), len(embeddings2)]."""
        return self._embedder.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines [texts] of the rows of one with those of the other."""
        return np.einsum("td,td->t", np.asarray(embeddings1), np.asarray(embeddings2))

    def index(self, corpus: Any, **options: Any) -> None:
        """Keeps the corpus; it is encoded when it is searched, a chunk at a time."""
        self._corpus = corpus

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        top_ranked: Any = None,
        **options: Any,
    ) -> dict[str, dict[str, float]]:
        """The `top_k` documents of each query: query id -> document id -> score."""
        corpus, self._corpus = self._corpus, None
        if top_ranked is not None or not _plain(queries):
            # Candidates to rank again, instructions, conversations: MTEB knows how to read them.
            encoder: Any = self  # the protocol's own __init__ is for MTEB's registry
            wrapped = SearchEncoderWrapper(encoder)
            wrapped.index(
                corpus,
                task_metadata=task_metadata,
                hf_split=hf_split,
                hf_subset=hf_subset,
                encode_kwargs=options["encode_kwargs"],
            )
            return wrapped.search(
                queries,
                task_metadata=task_metadata,
                hf_split=hf_split,
                hf_subset=hf_subset,
                top_k=top_k,
                top_ranked=top_ranked,
                **options,
            )
        query_ids = list(queries["id"])
        document_ids = list(corpus["id"])
        found = rank(
            self._embed(list(queries["text"]), _side(task_metadata.name, "query")),
            self._documents(corpus, _side(task_metadata.name, "document")),
            self._compressions,
            top_k,
            self._embedder.mesh,
        )
        rankings = {}
        for one, (scores_Qk, places_Qk) in found.items():
            # MTEB's depth is of use to MTEB alone, and as Python objects it is large.
            depth = top_k if one == self._compressions[0] else RECALL_DEPTH + 1
            rankings[one] = {
                query: [(document_ids[i], score) for i, score in zip(places, scores, strict=True)]
                for query, scores, places in zip(
                    query_ids,
                    scores_Qk[:, :depth].tolist(),
                    places_Qk[:, :depth].tolist(),
                    strict=True,
                )
            }
        self.rankings[hf_split, hf_subset] = rankings
        return {query: dict(hits) for query, hits in rankings[self._compressions[0]].items()}

    def _documents(self, corpus: Any, side: Side) -> Iterator[np.ndarray]:
        for first in range(0, len(corpus), self._chunk):
            rows = corpus[first : first + self._chunk]
            titles = rows.get("title") or [None] * len(rows["text"])
            yield self._embed(
                [
                    f"{title or ''} {text}".strip()
                    for title, text in zip(titles, rows["text"], strict=True)
                ],
                side,
            )

    def _embed(self, texts: list[str], side: Side) -> np.ndarray:
        return self._embedder.encode(texts, side, encoded=self._encoded)


def _side(task: str, prompt_type: Any) -> Side:
    kind = getattr(prompt_type, "value", prompt_type)
    return "query" if kind == "query" or (kind == "document" and task in SYMMETRIC) else "document"


def _plain(queries: Any) -> bool:
    return "instruction" not in queries.column_names and (
        not len(queries) or isinstance(queries[0]["text"], str)
    )


def _owned(name: str) -> str:
    """A name as MTEB wants it, `owner/model`, from a path or a hub name."""
    parts = re.sub(r"[^\w./-]+", "-", name).strip("/.").split("/")
    return "/".join(parts[-2:]) if len(parts) > 1 else f"arcticjax/{parts[-1] or 'encoder'}"
