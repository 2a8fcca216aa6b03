"""Command line of evaluation: reads what to score and on what, and turns errors into exit codes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from arcticjax import config as configs
from arcticjax import errors
from arcticjax.buckets import must_be_on_disk
from arcticjax.config.contract import MIN_LENGTH
from arcticjax.parallel import command

# What a run directory calls its evaluation.
FOLDER = "evaluation"


def main(arguments: Sequence[str] | None = None) -> int:
    """Scores what the arguments say; returns 0. Errors are `arcticjax.errors.ArcticError`."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.config is None) == (options.checkpoint is None):
        parser.error("give either --config or --checkpoint")
    if options.set and options.config is None:
        parser.error("--set changes a config; give --config")
    if options.length is not None and options.length < MIN_LENGTH:
        parser.error(f"--length {options.length}: expected {MIN_LENGTH} or more")
    config = configs.load_config(options.config, options.set) if options.config else None
    model = options.checkpoint if config is None else config.run.directory
    names = options.tasks or (config.evaluation.tasks if config else [])
    if not names:
        parser.error("no tasks: name some with --tasks, such as beir:FOLDER or mteb:NFCorpus")
    output = _output(options.output, model)
    mesh = config.mesh if config else configs.MeshConfig()
    precision = options.precision or (config.train.precision if config else "float32")

    # Only now: --help and a wrong config should not wait for jax.
    from arcticjax.evaluate import run
    from arcticjax.parallel import distributed
    from arcticjax.parallel.mesh import make_mesh

    _show_log()
    distributed.start(mesh.platform, mesh.policy)
    run.run(
        run.Request(
            model=model,
            tasks=names,
            output=output,
            step=options.step,
            pooling=options.pooling,
            made=_made(config, names),
            length=options.length,
            compressions=options.compress,
            precision=precision,
            peer_seconds=mesh.peer_seconds,
        ),
        make_mesh(mesh.data, mesh.fsdp, mesh.slices),
    )
    return 0


def _parser() -> errors.ArgumentParser:
    parser = errors.ArgumentParser(
        prog="python -m arcticjax.evaluate",
        description="Score an encoder on retrieval tasks. The same command again goes on after the "
        "last finished task.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of a training run: scores its run.directory on its evaluation.tasks",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="RUN",
        help="run directory of arcticjax.train, or a model folder or hub name with safetensors",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="mteb:NAME, mteb:retrieval-15, nano-beir, or beir:FOLDER (corpus.jsonl, "
        "queries.jsonl, qrels.tsv); left out: those of the config",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help=f"folder of the report and of finished tasks; left out: RUN/{FOLDER}",
    )
    parser.add_argument(
        "--step", type=int, help="checkpoint step of a run (default: the newest good one)"
    )
    parser.add_argument(
        "--pooling",
        choices=("cls", "mean", "last"),
        help="how token vectors become one, for a plain Hugging Face folder that does not say",
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="TOKENS",
        help="cut queries and documents there, special tokens and prompt included; left out: 512 "
        "with mteb:retrieval-15, else the longer of the model's two lengths",
    )
    parser.add_argument(
        "--compress",
        nargs="+",
        default=[],
        metavar="KIND",
        help="also score compressed vectors: float32, int8 or int4, with @DIMENSIONS if truncated, "
        "such as float32@256 int8@256 int4@128",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of the encoder's arithmetic; left out: the config's, or float32",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="replace a field of the config; may be repeated",
    )
    return parser


def _output(given: str | None, model: str) -> Path:
    if given is None and not os.path.isdir(Path(os.path.expanduser(model), "checkpoints")):
        raise errors.ConfigError(f"--output: {model} is no run directory on a disk; say where")
    if given is not None:
        must_be_on_disk("--output", given)
    output = Path(os.path.expanduser(given or Path(model, FOLDER)))
    # Of os.path: what can be no path is none that is there.
    if os.path.exists(output) and not os.path.isdir(output):
        raise errors.ConfigError(f"--output {output}: is a file; name a folder")
    return output


def _made(config: configs.RunConfig | None, names: Sequence[str]) -> dict[str, Path]:
    """The task of held-out docstrings, made again if its cache is gone."""
    if config is None or config.data.docstrings is None or "docstrings" not in names:
        return {}
    from arcticjax.data import catalog, docstrings

    found = docstrings.extract(
        config.data.docstrings,
        catalog.cache_folder(config) / "docstrings",
        config.train.global_batch,
    )
    return {"docstrings": found.task_folder} if found.task_folder is not None else {}


def _show_log() -> None:
    """Shows the parts' own messages on stderr; MTEB's are of no use to a user."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.StreamHandler())
        root.handlers[0].setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.getLogger("arcticjax").setLevel(logging.INFO)
    logging.getLogger("mteb").setLevel(logging.ERROR)


if __name__ == "__main__":
    errors.run_cli(lambda: main(sys.argv[1:]), leave=command.leave)
