"""Texts to vectors: tokenise, pack, encode on the mesh, and give back in the order asked.

The one path by which evaluation, mining, export checks and users embed text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from arcticjax.config.contract import TextContract
from arcticjax.data import assemble, layout
from arcticjax.models.encoder import Encoder
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.parallel import mesh as meshes
from arcticjax.step.encode import make_encode

Side = Literal["query", "document"]

# Rows of the longest cap that a device encodes at once.
ROWS = 8


def templates(contract: TextContract, tokenizer: TextTokenizer) -> dict[Side, assemble.Template]:
    """What surrounds the texts of each side, by a contract."""

    def one(prompt: str, longest: int) -> assemble.Template:
        return assemble.Template(
            tokenizer.start_id, tokenizer.encode_prompt(prompt), tokenizer.end_id, longest
        )

    return {
        "query": one(contract.query_prompt, contract.query_length),
        "document": one(contract.document_prompt, contract.document_length),
    }


def row_length(templates: Mapping[Side, assemble.Template]) -> int:
    """Tokens of a row that holds any text of either side."""
    longest = max(template.longest for template in templates.values())
    return layout.round_up(longest, layout.TOKENS_PER_SLOT)


class Embedder:
    """Encodes texts with one set of parameters on one mesh.

    mesh: the devices it runs on. rows: rows of the longest cap that a device encodes at once.
    truncate_dim: numbers of a vector that are kept unless `encode` is told otherwise; None: all.
    `params` may be replaced at any time (training does).
    """

    def __init__(
        self,
        encoder: Encoder,
        params: Any,
        tokenizer: TextTokenizer,
        contract: TextContract,
        mesh: Mesh,
        *,
        rows: int = ROWS,
        dtype: Any = jnp.float32,
        truncate_dim: int | None = None,
    ) -> None:
        self.params = params
        self.contract = contract
        self.dimension = truncate_dim or encoder.spec.hidden_size
        self.dtype = dtype
        self._width = encoder.spec.hidden_size
        self._tokenizer = tokenizer
        self._templates = templates(contract, tokenizer)
        self.mesh = mesh
        self._rows = rows
        self._row_length = row_length(self._templates)
        self._encode = make_encode(encoder, mesh, pooling=contract.pooling, dtype=jnp.dtype(dtype))

    def encode(
        self,
        texts: Sequence[str],
        prompt: Side = "document",
        dimension: int | None = None,
        *,
        encoded: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Unit vectors, float32 [texts, D], in the order given.

        prompt: the side the texts stand on, which decides prompt and cap. dimension: keep the first
        so many values and normalise again (Matryoshka). encoded: called now and then with the
        number of texts that were begun since. Every process of a run must make the same call.
        """
        if isinstance(texts, (str, bytes)):
            raise ValueError("texts: expected a list of texts, got one; write [text]")
        texts = list(texts)
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"texts: expected text, got {text!r:.80}")
        if not isinstance(prompt, str) or prompt not in self._templates:
            raise ValueError(f"prompt: {prompt!r} is neither 'query' nor 'document'")
        if dimension is not None and not isinstance(dimension, (int, np.integer)):
            raise ValueError(f"dimension: {dimension!r} is not a whole number")
        if dimension is not None and not 1 <= dimension <= self._width:
            raise ValueError(f"dimension: {dimension} is not in 1..{self._width}")
        dimension = self.dimension if dimension is None else int(dimension)
        vectors = self._packed(self._tokenizer.encode(texts), self._templates[prompt], encoded)
        if dimension < self._width:
            vectors = vectors[:, :dimension]
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def encode_tokens(self, texts: Sequence[np.ndarray], prompt: Side) -> np.ndarray:
        """As `encode`, for texts given as their own token ids: no special tokens, no prompt,
        uncut."""
        return self._packed(list(texts), self._templates[prompt])

    def fingerprint(self) -> str:
        """40 hexadecimal digits of a SHA-256 over all that a vector depends on: parameters,
        tokenizer, contract and precision."""
        digest = hashlib.sha256(
            json.dumps(
                [
                    self.contract.to_dict(),
                    self._tokenizer.sha256,
                    jnp.dtype(self.dtype).name,
                    self.dimension,
                ],
                sort_keys=True,
            ).encode()
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            values = np.asarray(leaf)
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
            digest.update(values.tobytes())
        return digest.hexdigest()[:40]

    def shapes(self) -> dict[str, Any]:
        """Sizes of the one compiled program, for announcements."""
        return {
            "devices": self.mesh.devices.size,
            "rows": self._rows,
            "row_length": self._row_length,
            "precision": jnp.dtype(self.dtype).name,
        }

    @staticmethod
    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine of every row of `a` with every row of `b`, for rows of unit length; float32
        [len(a), len(b)]."""
        return np.asarray(a, np.float32) @ np.asarray(b, np.float32).T

    def _packed(
        self,
        ids: list[np.ndarray],
        template: assemble.Template,
        encoded: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        vectors = np.zeros((len(ids), self._width), np.float32)
        if not ids:
            return vectors
        devices, rows, length = self.mesh.devices.size, self._rows, self._row_length
        slots = length // layout.TOKENS_PER_SLOT
        lengths = template.lengths(np.array([len(one) for one in ids]))
        row_of, starts, slot_of, used = layout.pack(lengths, length, slots)

        block = devices * rows
        local = meshes.local_positions(self.mesh)
        by_row = np.argsort(row_of, kind="stable")
        first_of_block = np.searchsorted(row_of[by_row], np.arange(0, used + block, block))
        pending = []
        for number, (begin, end) in enumerate(itertools.pairwise(first_of_block)):
            chosen = by_row[begin:end]
            if not len(chosen):
                continue
            row = row_of[chosen] - number * block
            tokens_RS = np.zeros((block, length), np.int32)
            starts_RK = np.full((block, slots), length, np.int32)
            lengths_RK = np.zeros((block, slots), np.int32)
            starts_RK[row, slot_of[chosen]] = starts[chosen]
            lengths_RK[row, slot_of[chosen]] = lengths[chosen]
            assemble.fill_rows(
                tokens_RS, [ids[text] for text in chosen], row * length + starts[chosen], template
            )
            parts = [
                array.reshape(devices, rows, -1)[local]
                for array in (tokens_RS, starts_RK, lengths_RK)
            ]
            found = self._encode(self.params, *meshes.host_to_global(self.mesh, parts))
            if meshes.one_at_a_time():
                jax.block_until_ready(found)
            pending.append((chosen, row, slot_of[chosen], found))
            if encoded is not None:
                encoded(len(chosen))
            # Two blocks in flight keep the devices busy; more would only hold memory.
            if len(pending) > 2:
                _collect(vectors, *pending.pop(0))
        for one in pending:
            _collect(vectors, *one)
        return vectors


def _collect(
    vectors: np.ndarray, texts: np.ndarray, row: np.ndarray, slot: np.ndarray, found: Any
) -> None:
    """Copies one block's embeddings to their texts' places."""
    found_RKD = np.asarray(found).reshape(-1, *found.shape[2:])
    vectors[texts] = found_RKD[row, slot]
