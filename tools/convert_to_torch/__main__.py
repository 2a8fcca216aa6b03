"""Writes a run's newest checkpoint, or a model folder, as a certified sentence-transformers
folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcticjax.config.contract import TextContract
from arcticjax.errors import CheckpointError, ConfigError, run_cli
from arcticjax.models.spec import POOLINGS, ModelSpec, Pooling

# What a run directory and its checkpoints are called (arcticjax.checkpoint).
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Source:
    """An encoder to write: `params` is a nested dict of NumPy float32 arrays, `origin` names it to
    people."""

    spec: ModelSpec
    params: dict[str, Any]
    contract: TextContract
    tokenizer_folder: Path
    origin: str


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; raises ArcticError for what the user can mend."""
    options = _parser().parse_args(arguments)
    checkpoint, output = Path(options.checkpoint), Path(options.output)
    if checkpoint.resolve() == output.resolve():
        raise ConfigError(f"--output {output}: is the checkpoint itself; name another folder")
    # Refused now rather than after the work.
    from arcticjax.export.certificate import write_certified
    from arcticjax.export.folder import check_replaceable

    check_replaceable(output)
    source = open_source(options.checkpoint, step=options.step, pooling=options.pooling)
    certificate = write_certified(
        output,
        spec=source.spec,
        params=source.params,
        tokenizer_folder=source.tokenizer_folder,
        contract=source.contract,
        embed=make_embed(source),
    )
    if certificate is not None:
        print(f"{source.origin} -> {output}")
        print(
            f"certified by {certificate.reader}: {len(certificate.probes)} texts, largest "
            f"difference {certificate.max_difference:.2g} (allowed {certificate.tolerance:.2g})"
        )
        for note in certificate.notes:
            print(f"note: {note}")
    return 0


def open_source(
    checkpoint: str, *, step: int | None = None, pooling: Pooling | None = None
) -> Source:
    """Reads a run directory (at `step`, default the newest good one), a model folder or a hub name.

    `pooling` is for plain Hugging Face folders, which do not state it. Raises ConfigError for
    options that do not apply and CheckpointError for damaged or foreign files.
    """
    if (Path(checkpoint) / CHECKPOINTS).is_dir():
        if pooling is not None:
            raise ConfigError("--pooling: a run states its pooling; leave the option out")
        return _open_run(Path(checkpoint), step)
    if step is not None:
        raise ConfigError(f"--step: {checkpoint} is not a run directory (no {CHECKPOINTS}/ in it)")
    from arcticjax.models.pretrained import load_pretrained

    loaded = load_pretrained(checkpoint, pooling=pooling)
    return Source(
        spec=loaded.spec,
        params=loaded.params,
        contract=loaded.contract,
        tokenizer_folder=loaded.tokenizer_file.parent,
        origin=str(checkpoint),
    )


def make_embed(source: Source) -> Callable[[list[str], Any], Any]:
    """(texts, 'query' | 'document') -> float32 [texts, D], by the path that training evaluates
    with."""
    from arcticjax.models.encoder import Encoder
    from arcticjax.models.tokenizer import TextTokenizer
    from arcticjax.parallel.mesh import make_mesh, replicate
    from arcticjax.step.embedder import Embedder

    mesh = make_mesh()
    embedder = Embedder(
        Encoder(source.spec),
        replicate(mesh, source.params),
        TextTokenizer.from_file(source.tokenizer_folder),
        source.contract,
        mesh,
    )
    return embedder.encode


def _open_run(run: Path, step: int | None) -> Source:
    from arcticjax.checkpoint.store import CheckpointStore
    from arcticjax.models.tokenizer import TextTokenizer

    store = CheckpointStore(run / CHECKPOINTS)
    if step is None:
        # Settled once: a run that is still going may save between the two reads below.
        step = store.newest()
        if step is None:
            raise CheckpointError(f"{run}: no checkpoint has been saved yet; let the run save one")
    meta = store.read_meta(step)
    try:
        stored = meta["model"]["spec"], meta["contract"]
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{run}: checkpoint {step} does not say its model and text contract; it was not "
            f"written by arcticjax.train of this version"
        ) from None
    contract = TextContract.from_dict(stored[1])
    expected = meta["model"].get("tokenizer_sha256")
    if expected is not None and TextTokenizer.from_file(run / TOKENIZER).sha256 != expected:
        raise CheckpointError(
            f"{run / TOKENIZER}: is not the tokenizer that checkpoint {step} was trained with; "
            f"put back the one with SHA-256 {expected}"
        )
    return Source(
        spec=ModelSpec.from_hf(stored[0], pooling=contract.pooling),
        params=store.restore_params(step),
        contract=contract,
        tokenizer_folder=run / TOKENIZER,
        origin=f"{run} at step {step}",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert_to_torch",
        description="Write a run's checkpoint as a sentence-transformers folder, and prove it: the "
        "same texts must give the same vectors before the folder gets its name.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN",
        help="run directory of arcticjax.train, or a model folder or hub name with safetensors",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FOLDER",
        help="folder to write; an earlier export is replaced",
    )
    parser.add_argument(
        "--step", type=int, help="checkpoint step of a run (default: the newest good one)"
    )
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="how token vectors become one, for a plain Hugging Face folder that does not say",
    )
    return parser


if __name__ == "__main__":
    # A broken pipe or a bug shows itself; what the user can mend ends in one line.
    run_cli(lambda: main(sys.argv[1:]))
