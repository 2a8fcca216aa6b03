"""Commands as they are shown, checked and run."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

from arcticjax.config.secrets import find_secret
from arcticjax.errors import ConfigError


def check_no_secret(words: Sequence[str]) -> None:
    """Refuses words that hold what looks like a token: all users of a machine can read its
    command lines, and logs keep them."""
    for word in words:
        found = find_secret(word)
        if found is not None:
            raise ConfigError(
                f"command line: {found} looks like a secret, and command lines can "
                "be read by others and stand in logs; put NAME=value into a file that only you "
                "can read and give it with --env-file (GKE: name a Kubernetes secret in the spec)"
            )


@dataclass
class Runner:
    """Runs commands one after the other; with `dry_run` it prints them as a shell would take
    them."""

    dry_run: bool = False
    out: TextIO = field(default_factory=lambda: sys.stdout)

    def run(self, command: Sequence[str], *, stdin: str | None = None) -> int:
        """The command's exit code (0 for a dry run); its output is the terminal's."""
        check_no_secret(command)
        if self.dry_run:
            self._show(command, stdin)
            return 0
        try:
            return subprocess.run(command, input=stdin, text=True, check=False).returncode  # noqa: S603
        except FileNotFoundError:
            raise _missing(command[0]) from None

    def read(self, command: Sequence[str]) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command that only looks; also run where commands are
        only shown, so not for one that needs what a shown command would have made."""
        check_no_secret(command)
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        except FileNotFoundError:
            raise _missing(command[0]) from None
        return done.returncode, done.stdout, done.stderr

    def _show(self, command: Sequence[str], stdin: str | None) -> None:
        line = shlex.join(command)
        if stdin is not None:
            line += f" <<'END'\n{stdin.rstrip()}\nEND"
        print(line, file=self.out)


def _missing(program: str) -> ConfigError:
    return ConfigError(f"{program}: not found on this machine; install it and put it on PATH")
