"""Command line: are the checkpoints of a run whole?"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from arcticjax import errors
from arcticjax.checkpoint import verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 where every step is good. Errors are `ArcticError`."""
    parser = errors.ArgumentParser(
        prog="python -m arcticjax.checkpoint",
        description="Look at the checkpoints of a run. Nothing is changed, so it may run beside "
        "training.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    verifying = commands.add_parser(
        "verify",
        help="compare every file of every checkpoint with the size and SHA-256 that were written "
        "with it; exit code 0: all are good, 4: one is damaged, or none is good",
    )
    verifying.add_argument(
        "run", metavar="RUN", help="run.directory, or its checkpoints, on a disk or in a bucket"
    )
    options = parser.parse_args(arguments)

    directories = verify.find(options.run)
    verdicts = []
    for verdict in verify.verify(directories):
        print(verdict, flush=True)
        verdicts.append(verdict)
    for name in directories.set_aside():
        print(f"{name}  set aside by a run that found it damaged")
    newest = verify.require_good(directories, verdicts)
    print(f"{directories.place}: all good; the run would go on from step {newest}")
    return 0


if __name__ == "__main__":
    errors.run_cli(lambda: main(sys.argv[1:]))
