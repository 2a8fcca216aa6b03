"""Compressed vectors: truncated to their first values, and kept as 8 or 4 bit integers.

The quantiser is the one published with Arctic-Embed m-v1.5: uniform, with one limit b for every
corpus. A value x of a unit vector becomes code i = round(clip(x + b, 0, 2b) / c), c = 2b / (2^bits
- 1), and stands for c i - b.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from arcticjax.errors import ConfigError
from arcticjax.step.search import search

# The published limits b. Values of unit vectors of some hundred dimensions seldom lie outside.
LIMITS = {8: 0.30, 4: 0.18}
_NAME = re.compile(r"(?P<kind>float32|int8|int4)(@(?P<dimension>[1-9][0-9]*))?")
_BITS = {"float32": 32, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Compression:
    """How vectors are kept: `dimension` values of `bits` bits each (32 is float32); a `dimension`
    of None keeps all. Queries and documents are compressed alike."""

    dimension: int | None = None
    bits: int = 32

    @classmethod
    def parse(cls, name: str) -> Compression:
        """`float32`, `int8` or `int4`, with `@DIMENSION` if truncated: `int8@256`."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ConfigError(
                f"compression {name!r}: expected float32, int8 or int4, with @DIMENSION if "
                "truncated, such as int8@256"
            )
        dimension = match["dimension"]
        return cls(int(dimension) if dimension else None, _BITS[match["kind"]])

    def __str__(self) -> str:
        kind = next(kind for kind, bits in _BITS.items() if bits == self.bits)
        return kind if self.dimension is None else f"{kind}@{self.dimension}"

    def bytes_per_vector(self, width: int) -> int:
        """Bytes of one vector of a model of `width` dimensions; two 4 bit codes share a byte."""
        return -(-(self.dimension or width) * self.bits // 8)

    def keep(self, vectors: np.ndarray) -> np.ndarray:
        """What is searched, for unit vectors float32 [texts, D]: unit vectors float32 [texts, K],
        or codes less half their range, int8 [texts, K]."""
        vectors = truncate(vectors, self.dimension)
        if self.bits == 32:
            return vectors
        half = 1 << (self.bits - 1)
        return (quantize(vectors, self.bits).astype(np.int16) - half).astype(np.int8)

    def search(
        self, queries: np.ndarray, documents: np.ndarray, k: int, mesh: Mesh
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `step.search.search`, over what `keep` gave. Scores are inner products of the values
        that the codes stand for, computed in integers."""
        if self.bits == 32:
            return search(queries, documents, k, mesh)
        products_Qk, indices_Qk = search(queries, documents, k, mesh, score=odd_products)
        return products_Qk.astype(np.float32) * np.float32(step(self.bits) ** 2 / 4), indices_Qk


FULL = Compression()


def truncate(vectors: np.ndarray, dimension: int | None) -> np.ndarray:
    """The first `dimension` values, of unit length again (Matryoshka); None keeps all."""
    if dimension is None or dimension == vectors.shape[1]:
        return vectors
    if dimension > vectors.shape[1]:
        raise ConfigError(
            f"compression to {dimension} dimensions: the model's vectors have {vectors.shape[1]}"
        )
    kept = vectors[:, :dimension]
    return kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-12)


def step(bits: int) -> float:
    """The distance c between the values of neighbouring codes."""
    return 2 * LIMITS[bits] / (2**bits - 1)


def quantize(vectors: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 [texts, K] in 0..2^bits - 1."""
    limit = LIMITS[bits]
    return np.rint(np.clip(vectors + limit, 0, 2 * limit) / step(bits)).astype(np.uint8)


def dequantize(codes: np.ndarray, bits: int) -> np.ndarray:
    """The values float32 that codes stand for."""
    return (codes * step(bits) - LIMITS[bits]).astype(np.float32)


def pack(codes: np.ndarray) -> np.ndarray:
    """4 bit codes [texts, K] two to a byte, the first in the high half: uint8 [texts, ceil(K / 2)].
    With K odd, the last low half is 0."""
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return (even[:, ::2] << 4) | even[:, 1::2]


def unpack(packed: np.ndarray, dimension: int) -> np.ndarray:
    """The codes uint8 [texts, dimension] that `pack` was given."""
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(len(packed), -1)
    return codes[:, :dimension]


def integer_products(codes_QK: np.ndarray, codes_TK: np.ndarray, bits: int) -> np.ndarray:
    """Inner products float64 [Q, T] of the values that codes stand for, from integers alone:
    c^2 <i, j> - c b (sum i + sum j) + K b^2."""
    i, j = codes_QK.astype(np.int64), codes_TK.astype(np.int64)
    c, b = step(bits), LIMITS[bits]
    sums = i.sum(axis=1)[:, None] + j.sum(axis=1)[None, :]
    return c**2 * (i @ j.T) - c * b * sums + i.shape[1] * b**2


def odd_products(queries_BK: jax.Array, documents_TK: jax.Array) -> jax.Array:
    """The same products in units of c^2 / 4, int32 [B, T], from int8 codes s less half their range.

    c i - b = (c / 2) (2 s + 1), so it is <2s + 1, 2t + 1> = 4 <s, t> + 2 (sum s + sum t) + K, which
    stays below 2^31 up to 33,000 dimensions.
    """
    products_BT = jnp.matmul(queries_BK, documents_TK.T, preferred_element_type=jnp.int32)
    sums_B1 = queries_BK.sum(axis=1, dtype=jnp.int32)[:, None]
    sums_1T = documents_TK.sum(axis=1, dtype=jnp.int32)[None, :]
    return 4 * products_BT + 2 * (sums_B1 + sums_1T) + jnp.int32(queries_BK.shape[1])
