"""Command line of mining: reads the config, runs it, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from arcticjax import config as configs
from arcticjax import errors
from arcticjax.parallel import command

# Options of one mode.
_MODE_OF = {
    "negatives": "sweep",
    "topology": "plan",
    "lengths": "plan",
    "depth": "suspicious",
    "group": "suspicious",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Mines as the config says; returns 0. Errors are `arcticjax.errors.ArcticError`."""
    parser = errors.ArgumentParser(
        prog="python -m arcticjax.mine",
        description="Find candidates for hard negatives: for every query the documents that a "
        "teacher ranks highest, with scores. The same command again goes on where it stopped.",
        epilog=f"Fields of the config:\n\n{configs.describe(configs.MineConfig)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file that describes what is mined")
    parser.add_argument("--output", metavar="DIR", help="replace the config's output")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="replace a field of the config, for example top_k=200; may be repeated",
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--print-config", action="store_true", help="print the complete config and stop"
    )
    modes.add_argument(
        "--sweep",
        action="store_true",
        help="print and draw what upper thresholds leave of the candidates in output, without "
        "mining; needs only --output",
    )
    modes.add_argument(
        "--plan",
        metavar="QUERIES/DOCUMENTS",
        help="say what mining so many takes on --topology, such as 1e6/1e7, and stop",
    )
    modes.add_argument(
        "--suspicious",
        metavar="DIR",
        help="list the candidates of DIR that are probably relevant, with their texts and the "
        "positives of the same queries, in the Parquet file --output, and stop; --config only if "
        "the inputs have moved",
    )
    modes.add_argument(
        "--relabel",
        nargs=2,
        metavar=("DIR", "FILE"),
        help="copy the candidates of DIR to --output with the scores of FILE (Parquet: query_id, "
        "document_id, score), and stop",
    )
    modes.add_argument(
        "--merge",
        nargs="+",
        metavar="DIR",
        help="write the candidates of several teachers for the same inputs as one to --output, "
        "and stop",
    )
    parser.add_argument(
        "--negatives",
        type=int,
        metavar="N",
        help="with --sweep: a query is kept if N candidates pass (default 10)",
    )
    parser.add_argument(
        "--topology",
        metavar="KIND:SIZE",
        help="with --plan: a slice or GPUs (default v5e:2x4)",
    )
    parser.add_argument(
        "--lengths",
        metavar="QUERY/DOCUMENT",
        help="with --plan: mean tokens of queries and documents as encoded (default 16/200)",
    )
    parser.add_argument(
        "--depth",
        type=int,
        metavar="N",
        help="with --suspicious: how many candidates of each query are compared (default 20)",
    )
    parser.add_argument(
        "--group", metavar="NAME", help="with --suspicious: look at this group of DIR only"
    )
    options = parser.parse_args(arguments)
    _check_options(options)
    if options.relabel or options.merge:
        _derive(options.relabel, options.merge, options.output)
        return 0
    if options.suspicious:
        _suspicious(options)
        return 0
    if options.sweep and options.output is not None and options.config is None:
        _sweep(options.output, options.negatives)
        return 0
    if options.config is None:
        raise errors.ConfigError("--config FILE is missing; see python -m arcticjax.mine --help")
    sets = list(options.set)
    if options.output is not None:
        sets.append(f"output={options.output}")
    config = configs.load(configs.MineConfig, options.config, sets)
    if options.print_config:
        print(configs.dump_config(config), end="")
        return 0
    if options.sweep:
        _sweep(config.output, options.negatives)
        return 0
    if options.plan is not None:
        _plan(config, options.plan, options.topology, options.lengths)
        return 0

    # Only now: --help and a wrong config should not wait for jax.
    from arcticjax.mine import run

    command.show_log()
    run.run(config)
    return 0


def _check_options(options: argparse.Namespace) -> None:
    """ConfigError for an option that the mode which was asked for would not look at."""
    for name, mode in _MODE_OF.items():
        if getattr(options, name) is not None and not getattr(options, mode):
            raise errors.ConfigError(f"--{name} goes with --{mode} alone; remove it")
    mode = "--relabel" if options.relabel else "--merge" if options.merge else None
    for name in ("config", "set"):
        if mode and getattr(options, name):
            raise errors.ConfigError(f"--{name}: {mode} reads no config; remove it")
    if options.set and options.config is None:
        raise errors.ConfigError("--set replaces fields of a config; give --config FILE too")


def _sweep(output: str, given: int | None) -> None:
    """Prints a table for each group, and draws it into the report's folder."""
    from arcticjax.data import candidates
    from arcticjax.mine import figures, files, report, sweep

    minimum = _count(given, 10, "--negatives")
    opened = candidates.open_candidates(output)
    folder = opened.directory / report.FOLDER
    with files.explained(folder):
        folder.mkdir(exist_ok=True)
    for group in opened.groups:
        rows = sweep.sweep(opened, group, minimum=minimum)
        looked = f"{rows[0].queries:,} of {group.queries:,} queries" if rows else "no queries"
        print(f"{group.name}: {looked}, {minimum} negatives wanted")
        print(_columns(sweep.table(rows)))
        picture = figures.draw_yield(rows, minimum, f"{group.name}: yield")
        path = folder / f"{group.name}-sweep.png"
        files.write_whole(path, lambda file, picture=picture: file.write(picture))
        print(f"{path}\n")


def _derive(
    relabelled: Sequence[str] | None, merged: Sequence[str] | None, output: str | None
) -> None:
    from arcticjax.data import candidates
    from arcticjax.mine import derive

    if output is None:
        raise errors.ConfigError("--output DIR is missing: where the new candidates go")
    if relabelled:
        folder, file = candidates.open_candidates(relabelled[0]), Path(relabelled[1])
        count = derive.relabel(folder, file.expanduser(), Path(output))
        print(f"{output}: {count:,} scores replaced")
    if merged:
        derive.merge([candidates.open_candidates(one) for one in merged], Path(output))
        print(f"{output}: {len(merged)} teachers' candidates as one")


def _suspicious(options: argparse.Namespace) -> None:
    from arcticjax.data import candidates
    from arcticjax.mine import inputs, suspicious

    depth = _count(options.depth, 20, "--depth")
    if options.output is None:
        raise errors.ConfigError("--output FILE.parquet is missing: where the list goes")
    folder = candidates.open_candidates(options.suspicious)
    if options.config is None:
        given = [configs.InputConfig(**one) for one in folder.manifest.get("inputs", [])]
    else:
        given = inputs.inputs_of(configs.load(configs.MineConfig, options.config, options.set))
    groups = [group for group in folder.groups if options.group in (None, group.name)]
    if not groups:
        names = ", ".join(group.name for group in folder.groups)
        raise errors.ConfigError(
            f"--group: {folder.directory} has no {options.group!r}; it has {names}"
        )
    output = Path(options.output).expanduser()
    found, queries = suspicious.write_suspicious(folder, groups, given, output, depth)
    print(
        f"{output}: {found:,} suspicious candidates of {queries:,} queries, and these queries' "
        "positives"
    )


def _count(given: int | None, default: int, flag: str) -> int:
    if given is not None and given < 1:
        raise errors.ConfigError(f"{flag}: {given} is not 1 or more")
    return given or default


def _plan(
    config: configs.MineConfig, counts: str, topology: str | None, lengths: str | None
) -> None:
    from arcticjax.mine import plan, teacher

    queries, documents = _pair(counts, "--plan", "two counts such as 1e6/1e7", 1)
    means = _pair(
        lengths or "16/200", "--lengths", "two means of 3 tokens or more such as 16/200", 3
    )
    chip, chips = plan.parse_slice(topology or "v5e:2x4")
    source = teacher.load_teacher(config).source
    made = plan.make_plan(
        config,
        source.spec,
        teacher.size(source),
        int(queries),
        int(documents),
        chip,
        chips,
        lengths=means,
        row_length=max(source.contract.query_length, source.contract.document_length),
    )
    print(plan.to_text(made))


def _pair(text: str, flag: str, expected: str, least: float) -> tuple[float, float]:
    try:
        left, right = (float(part) for part in text.split("/"))
    except ValueError:
        left = right = math.nan
    if not (least <= left < math.inf and least <= right < math.inf):
        raise errors.ConfigError(f"{flag}: {text!r} is not {expected}")
    return left, right


def _columns(table: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    )


if __name__ == "__main__":
    errors.run_cli(lambda: main(sys.argv[1:]), leave=command.leave)
