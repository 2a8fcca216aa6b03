"""Command line of planning: compiles a config's programs for a target and says what they need."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arcticjax import config as configs
from arcticjax import errors
from arcticjax.plan import topology


def main(arguments: Sequence[str] | None = None) -> int:
    """Plans what the arguments say; returns 0, whether or not it fits."""
    parser = errors.ArgumentParser(
        prog="python -m arcticjax.plan",
        description="Compile a config's programs for a TPU slice or for GPUs, without them, and "
        "say whether they fit and what a step costs.",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file that describes the run"
    )
    parser.add_argument(
        "--mine",
        metavar="QUERIES/DOCUMENTS",
        help="FILE describes mining (python -m arcticjax.mine): compile what it runs for so many, "
        "such as 1e6/1e7",
    )
    parser.add_argument(
        "--topology",
        metavar="KIND:SIZE",
        help=f"a slice or a number of GPUs ({', '.join(topology.CHIPS)}; such as v5e:16x16, "
        "v5p:4x4x4 or h200:8), or cpu:N for N fake devices; left out: the devices of this machine",
    )
    parser.add_argument("--json", metavar="FILE", help="write the plan there, too")
    parser.add_argument(
        "--hlo",
        metavar="FILE",
        help="write the training step there as compiled, for those who read such text and for "
        "benchmarks.tpu_cycles",
    )
    parser.add_argument(
        "--fit",
        action="store_true",
        help="if it does not fit, look for the smallest change that does",
    )
    parser.add_argument(
        "--largest-batch",
        action="store_true",
        help="look for the largest global batch whose training step fits, by powers of two",
    )
    parser.add_argument(
        "--lengths",
        metavar="QUERY/DOCUMENT",
        help="mean tokens of queries and of documents before they are cut, such as 12/180; left "
        "out: those of the stored sources, if at hand, else 30/228",
    )
    parser.add_argument(
        "--efficiency",
        type=float,
        metavar="FRACTION",
        help="share of its peak that a chip reaches while it computes, for the projected time; "
        "left out: 0.5, or 0.35 for hidden sizes below 768",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="replace a field of the config, for example train.global_batch=32768; may be repeated",
    )
    options = parser.parse_args(arguments)
    target = topology.parse(options.topology)
    lengths = _lengths(options.lengths)
    if options.efficiency is not None and not 0 < options.efficiency <= 1:
        raise errors.ConfigError(f"--efficiency: {options.efficiency} is not in (0, 1]")
    for flag, file in (("--json", options.json), ("--hlo", options.hlo)):
        if file and not Path(file).absolute().parent.is_dir():
            raise errors.ConfigError(f"{flag}: no folder {Path(file).absolute().parent}")
    written = _mine(options, target) if options.mine else _train(options, target, lengths)
    if options.json:
        text = json.dumps(written, indent=2, allow_nan=False)
        _write("--json", Path(options.json), text + "\n")
    return 0


def _train(
    options: argparse.Namespace, target: topology.Target, lengths: tuple[float, float] | None
) -> dict[str, Any]:
    """Plans training and says so; what `--json` holds."""
    config = configs.load_config(options.config, options.set)
    # Only now: --help and a wrong config should not wait for jax, and it reads its environment
    # when it starts.
    topology.prepare_environment(target)
    from arcticjax.plan import fit, report
    from arcticjax.plan.planner import Planner

    _start(config, target)
    planner = Planner(target, lengths=lengths, efficiency=options.efficiency)
    plan = planner.plan(config)
    print(report.to_text(plan, options.config), flush=True)
    written = report.to_json(plan)

    def load(settings: Sequence[str]) -> configs.RunConfig:
        return configs.load_config(options.config, [*options.set, *settings])

    def say(line: str) -> None:
        print(line, flush=True)

    changes: list[str] = []
    if not plan.fits and not options.fit:
        print(report.advice(list(itertools.islice(fit.changes(plan, load), 8))))
    elif not plan.fits:
        found = fit.search(planner, plan, load, say)
        written["fit"] = None
        if found is not None:
            changes, plan = found
            written["fit"] = {"changes": changes, "plan": report.to_json(plan)}
            print(report.to_text(plan, options.config))
            print("fits by  " + " ".join(f"--set {one}" for one in changes))
        else:
            print("fits by  nothing that was tried; take a larger slice or a smaller global batch")
    elif options.fit:
        written["fit"] = {"changes": [], "plan": None}
        print("fits by  no change")
    if options.hlo and plan.train.refused is None:
        _write("--hlo", Path(options.hlo), plan.train.text)
    elif options.hlo:
        print(f"hlo      {options.hlo} is not written: the compiler refused the training step")
    if options.largest_batch and plan.capacity is None:
        raise errors.ConfigError("--largest-batch: the memory of these devices is not known")
    if options.largest_batch:
        largest = fit.largest_batch(planner, plan, lambda more: load([*changes, *more]), say)
        written["largest_batch"] = largest and report.to_json(largest)
        print(report.largest(largest))
    return written


def _mine(options: argparse.Namespace, target: topology.Target) -> dict[str, Any]:
    """Plans mining and says so; what `--json` holds."""
    counts = _pair(options.mine, "--mine", "two counts such as 1e6/1e7", 1)
    config = configs.load(configs.MineConfig, options.config, options.set)
    if options.lengths or options.efficiency or options.largest_batch or options.hlo:
        raise errors.ConfigError(
            "--lengths, --efficiency, --largest-batch, --hlo: have no effect with --mine, which "
            "has no training step and projects no time; see python -m arcticjax.mine --plan"
        )
    topology.prepare_environment(target)
    from arcticjax.plan import mining

    _start(config, target)

    def plan_it(config: configs.MineConfig) -> mining.MiningPlan:
        return mining.plan_mining(config, target, int(counts[0]), int(counts[1]))

    def load(settings: Sequence[str]) -> configs.MineConfig:
        return configs.load(configs.MineConfig, options.config, [*options.set, *settings])

    plan = plan_it(config)
    print(mining.to_text(plan, options.config), flush=True)
    written = mining.to_json(plan)
    if not plan.fits and not options.fit:
        print(f"try      --set document_block={-(-plan.block // 2)}")
    elif options.fit:
        found = ([], plan) if plan.fits else mining.fit(plan, load, plan_it, print)
        written["fit"] = found and {
            "changes": found[0],
            "plan": mining.to_json(found[1]) if found[0] else None,
        }
        how = "nothing that was tried; take a larger slice"
        if found is not None:
            how = " ".join(f"--set {one}" for one in found[0]) or "no change"
        print(f"fits by  {how}")
    return written


def _start(config: configs.RunConfig | configs.MineConfig, target: topology.Target) -> None:
    if target.name == "local":
        from arcticjax.parallel import distributed

        distributed.start(config.mesh.platform, config.mesh.policy)


def _lengths(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    return _pair(
        text, "--lengths", "QUERY/DOCUMENT, two means of 3 tokens or more such as 12/180", 3
    )


def _pair(text: str, flag: str, expected: str, least: float) -> tuple[float, float]:
    try:
        left, right = (float(part) for part in text.split("/"))
    except ValueError:
        left = right = math.nan
    if not (least <= left < math.inf and least <= right < math.inf):
        raise errors.ConfigError(f"{flag}: {text!r} is not {expected}")
    return left, right


def _write(flag: str, path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise errors.ResourceError(
            f"cannot write {path}: {error.strerror or error}; give another {flag}"
        ) from error


if __name__ == "__main__":
    errors.run_cli(lambda: main(sys.argv[1:]))
