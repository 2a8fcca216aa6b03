"""arcticjax: train Arctic-Embed text embedding models in JAX.

Importing this imports nothing heavy and starts no device; `load` does when it is called.
"""

from __future__ import annotations

import importlib.metadata
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arcticjax.models.spec import Pooling
    from arcticjax.step.embedder import Embedder

__all__ = ["__version__", "load"]

try:
    __version__ = importlib.metadata.version("arcticjax")
except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "unknown"


def load(
    name: str | os.PathLike[str], *, step: int | None = None, pooling: Pooling | None = None
) -> Embedder:
    """An encoder ready to embed texts, on every device that jax finds.

    name: a run directory, a folder in sentence-transformers or Hugging Face form, or a hub name.
    step: checkpoint of a run; None is the newest good one. pooling: for a plain Hugging Face
    folder, which does not state it. The result has `encode(texts, prompt="query" | "document",
    dimension=None)` -> float32 [texts, D], rows of unit length, and `similarity(a, b)`.

    Raises ConfigError for a name or option that does not fit, CheckpointError for damaged, foreign
    or unsafe files.
    """
    from arcticjax.export import source

    return source.load(name, step=step, pooling=pooling)
