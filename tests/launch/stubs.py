"""Stand-ins for gcloud and what a TPU VM has: they note their words, replay states, and run what
they are told on workers that are folders here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_GCLOUD = """#!{python}
import json, os, pathlib, shutil, subprocess, sys

root = pathlib.Path({root!r})
words = sys.argv[1:]
with open(root / "calls.jsonl", "a") as calls:
    print(json.dumps(words), file=calls)
verb = words[3]
states = json.loads((root / "states.json").read_text())
options = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
if verb == "describe":
    state = states[0]
    if len(states) > 1:
        (root / "states.json").write_text(json.dumps(states[1:]))
    if state is None:
        sys.exit("ERROR: (gcloud) NOT_FOUND: Resource was not found")
    print(json.dumps({{"name": words[4], "state": {{"state": state}}}}))
elif verb == "create":
    for n in range({workers}):
        home = root / f"worker-{{n}}"
        (home / "metadata").mkdir(parents=True)
        (home / "metadata" / "agent-worker-number").write_text(str(n))
        endpoints = ",".join(f"x:y:10.0.0.{{m + 1}}" for m in range({workers}))
        (home / "metadata" / "worker-network-endpoints").write_text(endpoints)
        (home / "metadata" / "tpu-env").write_text({tpu_env!r})
elif verb == "delete":
    for n in range({workers}):
        shutil.rmtree(root / f"worker-{{n}}", ignore_errors=True)
elif verb == "ssh":
    worst = 0
    for n in range({workers}):
        home = root / f"worker-{{n}}"
        if not home.is_dir():
            sys.exit("ERROR: (gcloud) cannot connect")
        path = f"{{root / 'worker-bin'}}:{{os.environ['PATH']}}"
        environment = {{**os.environ, "HOME": str(home), "PATH": path}}
        done = subprocess.run(["bash", "-c", options["command"]], cwd=home, env=environment)
        worst = worst or done.returncode
    sys.exit(worst)
elif verb == "scp":
    *sources, target = [word for word in words[4:] if not word.startswith("--")]
    for n in range({workers}):
        for source in sources:
            shutil.copy(source, root / f"worker-{{n}}" / target.partition(":")[2])
"""

_CURL = """#!/usr/bin/env bash
# curl -sf -H HEADER URL
exec cat "$HOME/metadata/${4##*/}"
"""

_UV = """#!/usr/bin/env bash
# uv sync ...
mkdir -p .venv/bin
ln -sf {python} .venv/bin/python
"""

_HOSTNAME = """#!/usr/bin/env bash
basename "$HOME"
"""


class Cloud:
    """A cloud of one job in a folder: put `bin` first in PATH."""

    def __init__(
        self, root: Path, states: Sequence[str | None], workers: int = 2, tpu_env: str = ""
    ) -> None:
        self.root = root
        self.bin = root / "bin"
        values = {
            "python": sys.executable,
            "root": str(root),
            "workers": workers,
            "tpu_env": tpu_env,
        }
        _script(self.bin / "gcloud", _GCLOUD.format(**values))
        _script(root / "worker-bin" / "curl", _CURL)
        _script(root / "worker-bin" / "uv", _UV.format(**values))
        _script(root / "worker-bin" / "hostname", _HOSTNAME)
        (root / "states.json").write_text(json.dumps(states))

    @property
    def path(self) -> str:
        """A PATH that finds the stand-ins first."""
        return f"{self.bin}:{os.environ['PATH']}"

    def verbs(self) -> list[str]:
        """What gcloud was asked to do, in order."""
        lines = (self.root / "calls.jsonl").read_text().splitlines()
        return [json.loads(line)[3] for line in lines]


def _script(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
