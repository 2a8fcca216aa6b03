"""Writes a run's newest checkpoint, or a model folder, as a certified sentence-transformers
folder; with --reverse, a sentence-transformers folder as one to start a run from."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcticjax.buckets import must_be_on_disk
from arcticjax.errors import ArgumentParser, ConfigError, run_cli
from arcticjax.models.spec import POOLINGS

if TYPE_CHECKING:
    from arcticjax.export.card import Facts
    from arcticjax.export.certificate import Certificate
    from arcticjax.export.source import Source

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; raises ArcticError for what the user can mend."""
    options = _parser().parse_args(arguments)
    must_be_on_disk("--output", options.output)
    output = Path(options.output)
    for checkpoint in options.checkpoint:
        if Path(checkpoint).resolve() == output.resolve():
            raise ConfigError(f"--output {output}: is the checkpoint itself; name another folder")
    # Refused now rather than after the work.
    from arcticjax.export.folder import check_replaceable

    check_replaceable(output)
    if options.reverse:
        origin, certificate = _import(options, output)
    else:
        origin, certificate = _export(options, output)
    if certificate is not None:
        print(f"{origin} -> {output}")
        print(
            f"certified by {certificate.reader}: {len(certificate.probes)} texts, largest "
            f"difference {certificate.max_difference:.2g} (allowed {certificate.tolerance:.2g})"
        )
        if certificate.as_loaded_difference is not None:
            print(
                f"computed in {certificate.dtype}: largest difference "
                f"{certificate.as_loaded_difference:.2g} (allowed "
                f"{certificate.as_loaded_tolerance:.2g})"
            )
        for note in certificate.notes:
            print(f"note: {note}")
    return 0


def _export(options: argparse.Namespace, output: Path) -> tuple[str, Certificate | None]:
    """Checkpoints or a model folder to a sentence-transformers folder."""
    from arcticjax.export.certificate import write_certified
    from arcticjax.export.folder import Storage
    from arcticjax.export.probes import probe_rows
    from arcticjax.export.source import make_embedder
    from arcticjax.parallel.mesh import replicate

    source, facts = _read(options)
    storage = Storage(options.dtype, options.shard_size, source.truncate_dim)
    embedder = make_embedder(source, rows=probe_rows(source.contract))
    stored = embedder
    if options.dtype != "float32":
        stored = copy.copy(embedder)  # shares the compiled program
        stored.params = replicate(embedder.mesh, storage.stored(source.params))
    certificate = write_certified(
        output,
        spec=source.spec,
        params=source.params,
        tokenizer_folder=source.tokenizer_folder,
        contract=source.contract,
        embed=embedder.encode,
        embed_stored=stored.encode,
        storage=storage,
        facts=facts,
    )
    return source.origin, certificate


def _import(options: argparse.Namespace, output: Path) -> tuple[str, Certificate]:
    """A sentence-transformers folder to one that a run can start from."""
    from arcticjax.export.certificate import import_certified
    from arcticjax.export.source import CHECKPOINTS, open_source
    from arcticjax.models.resolve import resolve

    given = {
        "several --checkpoint": len(options.checkpoint) > 1,
        "--average": options.average,
        "--step": options.step,
        "--pooling": options.pooling,
        "--dtype": options.dtype != "float32",
        "--truncate-dim": options.truncate_dim,
        "--results": options.results,
        "--fraction": options.fraction is not None,
        "--licence": options.licence is not None,
    }
    for option in (option for option, value in given.items() if value):
        raise ConfigError(
            f"{option}: has no meaning with --reverse, which takes one folder as it is, in float32"
        )
    name = options.checkpoint[0]
    folder = resolve(name)
    if (folder / CHECKPOINTS).is_dir():
        raise ConfigError(
            f"{name}: is a run, whose checkpoints are converted without --reverse; a run goes on "
            "by its own command, and another may start from its export"
        )
    if not (folder / "modules.json").is_file():
        raise ConfigError(
            f"{name}: has no modules.json, so it is no sentence-transformers folder and nothing "
            "states its vectors; convert it with --pooling and without --reverse"
        )
    source = open_source(name)
    return source.origin, import_certified(output, source, folder, shard_bytes=options.shard_size)


def _read(options: argparse.Namespace) -> tuple[Source, Facts]:
    """The encoder to write, averaged if asked, and what is known of it."""
    from arcticjax.export.average import average
    from arcticjax.export.folder import check_truncation
    from arcticjax.export.record import average_facts, facts_of
    from arcticjax.export.scores import read_evaluation
    from arcticjax.export.source import open_source

    names, steps = options.checkpoint, options.step or [None]
    if len(names) == 1:
        names = names * len(steps)
    elif len(steps) == 1:
        steps = steps * len(names)
    if len(names) != len(steps):
        raise ConfigError(
            f"--step: {len(steps)} steps for {len(names)} checkpoints; give one step for each, or "
            "several of one run"
        )
    if len(names) > 1 and options.average is None:
        raise ConfigError(
            f"--average: {len(names)} checkpoints become one folder only as an average; add "
            "--average uniform or --average slerp"
        )
    if options.fraction is not None and options.average != "slerp":
        raise ConfigError(
            "--fraction: is where slerp stands between two checkpoints; add --average slerp, or "
            "leave it out"
        )
    known: list[Facts] = []

    def opened() -> Iterator[Source]:
        for name, step in zip(names, steps, strict=True):
            source = open_source(name, step=step, pooling=options.pooling)
            known.append(facts_of(source))
            yield source

    if options.average is None:
        source = next(opened())
        facts = known[0]
    else:
        fraction = 0.5 if options.fraction is None else options.fraction
        source = average(opened(), options.average, fraction)
        facts = average_facts(known, source.averaged or "")
    if options.licence is not None:
        facts = dataclasses.replace(facts, licence=options.licence)
    if options.results is not None:
        evaluation = read_evaluation(options.results.expanduser(), source)
        facts = dataclasses.replace(facts, evaluation=evaluation)
    if options.truncate_dim is not None:
        check_truncation(options.truncate_dim, source.spec)
        source = dataclasses.replace(source, truncate_dim=options.truncate_dim)
    return source, facts


def _bytes(text: str) -> int:
    """Bytes of a size such as 5GB or 200MB, in powers of ten as Hugging Face counts."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", text.strip().upper())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write one as 5GB or 200MB")
    return int(float(match[1]) * _UNITS[match[2]])


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
        return int(text)

    return read


def _parser() -> argparse.ArgumentParser:
    from arcticjax.export.shards import SHARD_BYTES

    parser = ArgumentParser(
        prog="python -m tools.convert_to_torch",
        description="Write a run's checkpoint as a sentence-transformers folder, and prove it: the "
        "same texts must give the same vectors before the folder gets its name.",
    )
    add: Any = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        nargs="+",
        metavar="RUN",
        help="run directory of arcticjax.train, or a model folder or hub name with safetensors; "
        "several with --average",
    )
    add(
        "--output",
        required=True,
        metavar="FOLDER",
        help="folder to write; an earlier export is replaced",
    )
    add(
        "--reverse",
        action="store_true",
        help="from a sentence-transformers folder to one for model.init, proved against "
        "sentence-transformers",
    )
    add(
        "--step",
        type=_whole(0),
        nargs="+",
        metavar="N",
        help="checkpoint step of a run (default: the newest good one); several with --average",
    )
    add(
        "--pooling",
        choices=POOLINGS,
        help="how token vectors become one, for a plain Hugging Face folder that does not say",
    )
    add(
        "--average",
        choices=("uniform", "slerp"),
        help="average the weights of several checkpoints of one kind: their mean, or the point at "
        "--fraction on the arc between two",
    )
    add(
        "--fraction",
        type=float,
        metavar="F",
        help="where slerp stands between the first (0) and the second (1); default 0.5",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of the weights in the folder (default: float32)",
    )
    add(
        "--truncate-dim",
        type=_whole(1),
        metavar="N",
        help="the folder gives the first N numbers of a vector (Matryoshka)",
    )
    add(
        "--shard-size",
        type=_bytes,
        default=SHARD_BYTES,
        metavar="SIZE",
        help="weights larger than this come in several files; default 5GB",
    )
    add("--licence", metavar="NAME", help="licence of the model, for its card")
    add(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="what arcticjax.evaluate wrote for these weights (its --output, or the JSON file in "
        "it), for the card",
    )
    return parser


if __name__ == "__main__":
    # A broken pipe or a bug shows itself; what the user can mend ends in one line.
    run_cli(lambda: main(sys.argv[1:]))
