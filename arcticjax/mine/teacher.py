"""The encoder that scores, with the contract its texts go through."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from arcticjax.config import MineConfig
from arcticjax.errors import ConfigError
from arcticjax.export.source import Source, open_source
from arcticjax.models.encoder import Encoder
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.parallel.mesh import replicate
from arcticjax.step.embedder import Embedder


@dataclass(frozen=True)
class Teacher:
    """sha256: of the weights as loaded, with their names and shapes."""

    source: Source
    tokenizer: TextTokenizer
    sha256: str

    def embedder(self, mesh: Mesh, precision: str) -> Embedder:
        """Embeds on `mesh`, computing in `precision`."""
        return Embedder(
            Encoder(self.source.spec),
            replicate(mesh, self.source.params),
            self.tokenizer,
            self.source.contract,
            mesh,
            dtype=jnp.dtype(precision),
        )


def load_teacher(config: MineConfig) -> Teacher:
    """The teacher of a config; raises ConfigError where `contract` does not fit it."""
    source = open_source(config.teacher, pooling=config.contract.pooling)
    asked = config.contract.model_dump(exclude_none=True)
    for field in ("query_length", "document_length"):
        if asked.get(field, 0) > source.spec.max_positions:
            raise ConfigError(
                f"contract.{field}: {asked[field]} tokens, but {config.teacher} takes "
                f"{source.spec.max_positions} at most"
            )
    contract = dataclasses.replace(source.contract, **asked)
    tokenizer = TextTokenizer.from_file(source.tokenizer_folder)
    for prompt in (contract.query_prompt, contract.document_prompt):
        tokenizer.encode_prompt(prompt)
    return Teacher(dataclasses.replace(source, contract=contract), tokenizer, source.sha256)


def size(source: Source) -> int:
    """Numbers in the weights."""
    return sum(np.size(leaf) for leaf in jax.tree.leaves(source.params))
