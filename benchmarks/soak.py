"""Kills training at random moments until it is done, and compares the bits.

python -m benchmarks.soak --kills 50 --seed 0 --json OUT

One run is left alone. Another, of the same config, is killed again and again (SIGKILL or SIGTERM,
after a random time from its start) and started again by the same command; once it is done, the next
one begins, until so many kills were made. Each must end with the same state (weights, moments,
step), the same metrics of every step and the same evaluations, bit for bit, and none may ever leave
a damaged checkpoint. `--config` takes a config of your own; left out, it is a tiny run.

Exit code 1, and what was seen, where any of this does not hold.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
# Codes that a stopped run may end with; -SIGTERM where it was still starting Python.
_EXPECTED = {signal.SIGKILL: {-signal.SIGKILL}, signal.SIGTERM: {42, -signal.SIGTERM}}
_RATES = re.compile(r'"(?:\w+_per_second|data_wait_fraction)": [^,}]+,?')
_TINY = {
    "train.total_steps": 400,
    "checkpoint.save_every_steps": 10,
    "evaluation.every_steps": 40,
    "train.log_every_steps": 1,
    "report.plots": False,
    "export.enabled": False,
}


@dataclass(frozen=True)
class Kill:
    """One kill: the signal, seconds after the start, the part of the run it fell into (as
    goodput.json calls it; `start` for all before the first), the exit code, the step that the run
    had reported and the step that it goes on from."""

    signal: str
    seconds: float
    part: str
    code: int
    reported: int
    kept: int


def command(config: Path, run: Path, compiled: Path) -> list[str]:
    """The one command of a run."""
    sets = (f"run.directory={run}", f"run.compilation_cache={compiled}")
    return [
        *(sys.executable, "-m", "arcticjax.train", "--config", str(config)),
        *(word for one in sets for word in ("--set", one)),
    ]


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        cwd=_ROOT,
        env={key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def state_digest(run: Path) -> str:
    """SHA-256 of everything in the last checkpoint of a run; exits where it is damaged."""
    import jax

    from arcticjax.checkpoint.orbax_io import read_arrays
    from arcticjax.checkpoint.step_directories import StepDirectories

    steps = StepDirectories(run / "checkpoints")
    last = steps.numbers()[-1]
    problem, manifest = steps.verify(last)
    if problem is not None or manifest is None:
        raise SystemExit(f"{run}: step {last} is damaged: {problem}")
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in manifest.leaves.items()
    }
    digest = hashlib.sha256()
    for name, array in read_arrays(steps.path(last), wanted, as_numpy=True).items():
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def records(run: Path) -> str:
    """SHA-256 of the metrics of every step, rates left out, and of the evaluations."""
    metrics = _RATES.sub("", (run / "metrics.jsonl").read_text())
    return hashlib.sha256((metrics + (run / "evaluations.jsonl").read_text()).encode()).hexdigest()


def attempts(run: Path) -> list[dict[str, Any]]:
    """What goodput.json knows of the starts of a run."""
    file = run / "goodput.json"
    return json.loads(file.read_text())["attempts"] if file.exists() else []


def newest_good(run: Path) -> int:
    """The step that a run would go on from; exits where one is damaged."""
    from arcticjax.checkpoint.step_directories import StepDirectories
    from arcticjax.checkpoint.verify import verify

    verdicts = list(verify(StepDirectories(run / "checkpoints")))
    bad = [str(verdict) for verdict in verdicts if verdict.problem is not None]
    if bad:
        raise SystemExit(f"{run}: a kill left a damaged checkpoint: {bad}")
    return verdicts[-1].step if verdicts else 0


def reported_step(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill(words: list[str], run: Path, number: signal.Signals, seconds: float) -> Kill | None:
    """Starts the run and kills it after `seconds`; None where it was done before."""
    before = len(attempts(run))
    process = start(words)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        output, _ = process.communicate(timeout=300)
    if process.returncode == 0:
        return None
    if process.returncode not in _EXPECTED[number]:
        raise SystemExit(f"{output}\n{number.name} after {seconds:.2f} s: {process.returncode}")
    known = attempts(run)
    part = known[-1]["part"] if len(known) > before else "start"
    return Kill(
        number.name, seconds, part, process.returncode, reported_step(run), newest_good(run)
    )


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Makes the kills and compares; exits where the bits differ."""
    compiled = folder / "compiled"
    straight = folder / "straight"
    began = time.monotonic()
    alone = start(command(options.config, straight, compiled))
    output, _ = alone.communicate()
    if alone.returncode:
        raise SystemExit(f"{output}\nthe run left alone failed with {alone.returncode}")
    seconds = time.monotonic() - began
    wanted = (state_digest(straight), records(straight))
    parts = json.loads((straight / "goodput.json").read_text())["parts"]
    training = sum(parts[part] for part in ("data", "step", "save", "evaluate"))
    # As long before the first step as after it, so that kills fall into both; programs are compiled
    # only once.
    span = options.span or 2 * max(1.0, seconds - training - parts["compile"])
    print(f"the run left alone took {seconds:.1f} s, {training:.1f} s of them training", flush=True)

    random_ = random.Random(options.seed)
    kills: list[Kill] = []
    runs = 0
    while len(kills) < options.kills or runs == 0:
        runs += 1
        run = folder / f"killed-{runs}"
        words = command(options.config, run, compiled)
        while True:
            number = random_.choice((signal.SIGKILL, signal.SIGTERM))
            delay = random_.uniform(0, span)
            made = kill(words, run, number, delay if len(kills) < options.kills else 1e6)
            if made is None:
                break
            kills.append(made)
            print(f"{len(kills)}: {made}", flush=True)
        found = (state_digest(run), records(run))
        if found != wanted:
            raise SystemExit(f"{run}: state and records {found}, left alone they are {wanted}")
        print(f"{run.name}: done, state sha256 {found[0][:16]} as left alone", flush=True)
    return {
        "seed": options.seed,
        "kills": [asdict(one) for one in kills],
        "runs": runs,
        "state_sha256": wanted[0],
        "records_sha256": wanted[1],
        "most_steps_done_again": max((one.reported - one.kept for one in kills), default=0),
        "seconds": time.monotonic() - began,
    }


def table(kills: list[dict[str, Any]]) -> str:
    """Kills by the part of the run they fell into."""
    lines = ["| while in | SIGKILL | SIGTERM | exit codes | steps done again, at most |"]
    lines.append("|---|---|---|---|---|")
    by_part: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for one in kills:
        by_part[one["part"]].append(one)
    for part, group in sorted(by_part.items(), key=lambda item: -len(item[1])):
        count = collections.Counter(one["signal"] for one in group)
        codes = ", ".join(map(str, sorted({one["code"] for one in group})))
        again = max(one["reported"] - one["kept"] for one in group)
        lines.append(f"| {part} | {count['SIGKILL']} | {count['SIGTERM']} | {codes} | {again} |")
    return "\n".join(lines)


def tiny_config(folder: Path) -> Path:
    """The tiny run of the tests."""
    from tests import tiny

    return tiny.run_config(folder / "tiny", **_TINY)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="kills to make")
    parser.add_argument("--seed", type=int, default=0, help="decides signals and moments")
    parser.add_argument("--span", type=float, help="kills come 0 to so many seconds after a start")
    parser.add_argument("--config", type=Path, help="another run than the tiny one")
    parser.add_argument("--json", type=Path, help="where all kills are written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        options.config = options.config or tiny_config(Path(scratch))
        found = soak(options, Path(scratch))
    print(
        f"\n{len(found['kills'])} kills over {found['runs']} runs, seed {options.seed}, in "
        f"{found['seconds']:.0f} s: every run ended with the state and the records of the run left "
        f"alone\n\n{table(found['kills'])}"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
