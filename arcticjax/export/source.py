"""Opens a finished encoder, whatever holds it: a run's checkpoint, a model folder or a hub name."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from arcticjax.buckets import Bucket, folder_here, is_address
from arcticjax.checkpoint import mirror
from arcticjax.checkpoint.store import CheckpointStore
from arcticjax.config.contract import TextContract
from arcticjax.errors import CheckpointError, ConfigError
from arcticjax.models.bucket_model import holds_model
from arcticjax.models.encoder import Encoder
from arcticjax.models.pretrained import load_pretrained, read_json
from arcticjax.models.spec import ModelSpec, Pooling
from arcticjax.models.tokenizer import TextTokenizer
from arcticjax.parallel import distributed
from arcticjax.parallel.mesh import make_mesh, replicate
from arcticjax.step.embedder import ROWS, Embedder

# What a run directory calls its checkpoints and the copy of its tokenizer.
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
# What else `record` reads of a run.
_TOLD = ("config.yaml", "lineage.json", "evaluations.jsonl", "report/loss_and_ndcg.png")


@dataclass(frozen=True)
class Source:
    """An encoder to use or to write: `params` is a nested dict of NumPy float32 arrays, `origin`
    names it to people, `truncate_dim` is how many numbers of a vector a folder gives (None:
    all).

    run, step: where a run's checkpoint comes from. name: the folder or hub name of a model.
    averaged: how, for an average of several.
    """

    spec: ModelSpec
    params: dict[str, Any]
    contract: TextContract
    tokenizer_folder: Path
    origin: str
    truncate_dim: int | None = None
    run: Path | None = None
    step: int | None = None
    name: str | None = None
    averaged: str | None = None

    @cached_property
    def sha256(self) -> str:
        """Of the weights as loaded, with their names and shapes, in hex."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            array = np.ascontiguousarray(leaf)
            digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
            digest.update(array.view(np.uint8).data)
        return digest.hexdigest()


def open_source(
    name: str | os.PathLike[str], *, step: int | None = None, pooling: Pooling | None = None
) -> Source:
    """Reads a run directory (at `step`, default the newest good one) or a model folder, on a disk
    or in a bucket, or a hub name.

    `pooling` is for plain Hugging Face folders, which do not state it. A run is only read, also
    while it goes on. Raises ConfigError for options that do not apply and CheckpointError for
    damaged or foreign files.
    """
    text = os.fspath(name)
    folder, bucket = Path(os.path.expanduser(text)), None
    if is_address(text):
        bucket = Bucket(text, "checkpoint")
        is_run = not holds_model(bucket)
    else:
        # An empty name would be the current folder.
        is_run = bool(text) and os.path.isdir(folder / CHECKPOINTS)
    if is_run:
        if pooling is not None:
            raise ConfigError(f"pooling: {text} is a run, which states its pooling; leave it out")
        return _open_run(folder if bucket is None else _bring_run(bucket), step, bucket)
    if step is not None:
        raise ConfigError(f"step: {text} is not a run directory (no {CHECKPOINTS}/ in it)")
    loaded = load_pretrained(text, pooling=pooling)
    return Source(
        spec=loaded.spec,
        params=loaded.params,
        contract=loaded.contract,
        tokenizer_folder=loaded.tokenizer_file.parent,
        origin=text if bucket is None else bucket.address,
        truncate_dim=_truncation(loaded.folder, loaded.spec),
        name=text,
    )


def make_embedder(
    source: Source, mesh: Mesh | None = None, *, rows: int = ROWS, dtype: Any = jnp.float32
) -> Embedder:
    """The encoder on a mesh, by default of every device, computing in `dtype`: the path that
    training evaluates with. rows: as `Embedder` takes them."""
    mesh = mesh or make_mesh()
    return Embedder(
        Encoder(source.spec),
        replicate(mesh, source.params),
        TextTokenizer.from_file(source.tokenizer_folder),
        source.contract,
        mesh,
        rows=rows,
        dtype=dtype,
        truncate_dim=source.truncate_dim,
    )


def load(
    name: str | os.PathLike[str], *, step: int | None = None, pooling: Pooling | None = None
) -> Embedder:
    """An encoder ready to embed texts; see `open_source` for what it accepts and raises."""
    return make_embedder(open_source(name, step=step, pooling=pooling))


def _truncation(folder: Path, spec: ModelSpec) -> int | None:
    """To how many numbers sentence-transformers cuts the vectors of a folder; None: it does not."""
    file = folder / "config_sentence_transformers.json"
    found = read_json(file, required=False).get("truncate_dim")
    if found is not None and (type(found) is not int or found < 1):
        raise CheckpointError(f"{file}: truncate_dim {found!r} is not a positive whole number")
    return None if found is None or found >= spec.hidden_size else found


def _bring_run(bucket: Bucket) -> Path:
    """Copies what a run in a bucket says of itself, but for its checkpoints; gives the copy."""
    run = folder_here(bucket.address) / f"read-{distributed.rank()}" / bucket.address.split("/")[-1]
    tokenizer = {f"{TOKENIZER}/tokenizer.json", *(one.name for one in bucket.list(TOKENIZER))}
    mirror.bring(bucket, run, [*_TOLD, *tokenizer])
    return run


def _open_run(run: Path, step: int | None, bucket: Bucket | None = None) -> Source:
    place = run if bucket is None else bucket.address
    store = CheckpointStore(run / CHECKPOINTS, bucket=bucket and bucket.below(CHECKPOINTS))
    if step is None:
        # Settled once: a run that is still going may save between the two reads below.
        step = store.newest()
        if step is None:
            raise CheckpointError(f"{place}: no checkpoint has been saved yet; let it save one")
    meta = store.read_meta(step)
    try:
        stored = meta["model"]["spec"], meta["contract"]
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{place}: checkpoint {step} does not say its model and text contract; it was not "
            f"written by arcticjax.train of this version"
        ) from None
    contract = TextContract.from_dict(stored[1])
    expected = meta["model"].get("tokenizer_sha256")
    if expected is not None and TextTokenizer.from_file(run / TOKENIZER).sha256 != expected:
        raise CheckpointError(
            f"{place}/{TOKENIZER}: is not the tokenizer that checkpoint {step} was trained with; "
            f"put back the one with SHA-256 {expected}"
        )
    return Source(
        spec=ModelSpec.from_hf(stored[0], pooling=contract.pooling),
        params=store.restore_params(step),
        contract=contract,
        tokenizer_folder=run / TOKENIZER,
        origin=f"{place} at step {step}",
        run=run,
        step=step,
    )
