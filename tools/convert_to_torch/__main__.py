"""Writes a run's newest checkpoint, or a model folder, as a certified sentence-transformers
folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from arcticjax.errors import ConfigError, run_cli
from arcticjax.models.spec import POOLINGS


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; raises ArcticError for what the user can mend."""
    options = _parser().parse_args(arguments)
    checkpoint, output = Path(options.checkpoint), Path(options.output)
    if checkpoint.resolve() == output.resolve():
        raise ConfigError(f"--output {output}: is the checkpoint itself; name another folder")
    # Refused now rather than after the work.
    from arcticjax.export.certificate import write_certified
    from arcticjax.export.folder import check_replaceable
    from arcticjax.export.source import make_embedder, open_source

    check_replaceable(output)
    source = open_source(options.checkpoint, step=options.step, pooling=options.pooling)
    certificate = write_certified(
        output,
        spec=source.spec,
        params=source.params,
        tokenizer_folder=source.tokenizer_folder,
        contract=source.contract,
        embed=make_embedder(source).encode,
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
