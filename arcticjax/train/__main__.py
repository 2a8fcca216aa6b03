"""Command line of training: reads the config, runs it, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from arcticjax import config as configs
from arcticjax import errors
from arcticjax.parallel import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains as the config says; returns 0. Errors are `arcticjax.errors.ArcticError`."""
    parser = errors.ArgumentParser(
        prog="python -m arcticjax.train",
        description="Train a text embedding model. The same command again resumes the run, or "
        "reports a finished one.",
        epilog=f"Fields of the config:\n\n{configs.describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file that describes the run"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="replace a field of the config, for example optimizer.learning_rate=1e-4; may be "
        "repeated",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the complete config and stop"
    )
    options = parser.parse_args(arguments)
    config = configs.load_config(options.config, options.set)
    if options.print_config:
        print(configs.dump_config(config), end="")
        return 0

    # Only now: --help and a wrong config should not wait for jax.
    from arcticjax.train import run

    command.show_log()
    run.run(config)
    return 0


if __name__ == "__main__":
    errors.run_cli(lambda: main(sys.argv[1:]), leave=command.leave)
