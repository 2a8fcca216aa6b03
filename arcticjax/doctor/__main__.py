"""Command line of the doctor: looks at everything that a run needs and prints a table."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arcticjax import buckets, errors
from arcticjax import config as configs
from arcticjax.config import RunConfig
from arcticjax.doctor import findings as reports
from arcticjax.doctor.findings import Finding, attempt, skipped
from arcticjax.parallel import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and returns 0, 2 or 8."""
    parser = errors.ArgumentParser(
        prog="python -m arcticjax.doctor",
        description="Look at this machine, the other processes of a run, and what its config "
        "names, before the run costs anything. Exit code 0: nothing failed; 8: only room is "
        "missing (disk, memory, permissions); 2: anything else. Start it as the run is started, "
        "on all machines of a pod. It leaves nothing behind.",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of the run; left out: the machine alone"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="replace a field of the config; may be repeated",
    )
    parser.add_argument("--json", metavar="FILE", help="write the findings there, too")
    options = parser.parse_args(arguments)
    if options.set and not options.config:
        raise errors.ConfigError("--set: there is no --config whose field it would replace")
    config = None
    found: list[Finding] = []
    if options.config:
        try:
            config = configs.load_config(options.config, options.set)
        except errors.ConfigError as error:
            # The machine can be looked at all the same.
            found.append(Finding("config", "fail", str(error)))
        else:
            found.append(Finding("config", "ok", options.config))

    # Only now: --help and a wrong usage should not wait for jax.
    from arcticjax.doctor import machine

    found.append(attempt("versions", machine.versions))
    found.append(attempt("SIGTERM", machine.stopping))
    found.append(attempt("open files", machine.open_files))
    everybody, prints = _look(config, found)
    code = reports.exit_code(everybody)
    if not prints:
        return code
    print(reports.table(everybody))
    if options.json:
        _write(Path(options.json), everybody, code)
    count = sum(one.status == "fail" for one in everybody)
    print("fit to start" if not code else f"{count} check(s) failed")
    return code


def _look(config: RunConfig | None, found: list[Finding]) -> tuple[list[Finding], bool]:
    """The findings of all processes, and whether it is for this one to print them.

    Where processes cannot join, each has and prints its own.
    """
    from arcticjax.doctor import pod
    from arcticjax.parallel import distributed

    asked = ("auto", "required") if config is None else (config.mesh.platform, config.mesh.policy)
    found.append(attempt("devices", lambda: pod.devices(*asked)))
    if found[-1].status == "fail":
        found += [skipped(check, "devices") for check in ("processes", "mesh", "all-gather")]
        return [*found, *_inputs(config)], True
    found += _together(config)
    found += _inputs(config)
    told = pod.exchange("findings", json.dumps([one.to_dict() for one in found]))
    by_process = [[Finding(**one) for one in json.loads(text)] for text in told]
    everybody = reports.merge(by_process, pod.exchange("hosts", socket.gethostname()))
    return everybody, distributed.talks()


def _together(config: RunConfig | None) -> list[Finding]:
    """What needs the other processes; all make the same checks in the same order."""
    import jax

    from arcticjax.doctor import pod

    found = [attempt("processes", lambda: pod.alike(config))]
    made: list[Any] = []

    def mesh() -> str:
        one, text = pod.make_mesh(config)
        made.append(one)
        return text

    found.append(attempt("mesh", mesh))
    # A program over all devices hangs where one process does not run it.
    if pod.all_agree("mesh", bool(made)):
        found.append(attempt("all-gather", lambda: pod.all_gather(made[0])))
    else:
        found.append(skipped("all-gather", "mesh"))
    if jax.process_count() > 1:
        found.append(attempt("clock", pod.clocks))
        if config is not None and not buckets.is_address(config.run.directory):
            directory = Path(config.run.directory).expanduser().absolute()
            found.append(attempt("shared disk", lambda: pod.shared(directory)))
    return found


def _inputs(config: RunConfig | None) -> list[Finding]:
    """What this process finds by itself: where it writes, and what the config names."""
    from arcticjax.doctor import inputs, machine
    from arcticjax.parallel import compilation_cache

    cache = "auto" if config is None else config.run.compilation_cache

    def compiled() -> Finding | str:
        folder = compilation_cache.keep_compiled(cache)
        if folder is not None:
            return f"kept in {folder}, private"
        if cache == "auto" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            return Finding(
                "compiled programs",
                "warn",
                "not kept: every start compiles anew",
                "name a folder of your own in run.compilation_cache",
            )
        return "as the environment or the config says, not in a folder of ours"

    found = [attempt("compiled programs", compiled)]
    if config is None:
        return [*found, attempt("memory", lambda: machine.memory(0))]

    models: list[inputs.Model] = []

    def model() -> str:
        models.append(inputs.model(config))
        return models[0].text

    found.append(attempt("model", model))
    loading = models[0].loading_bytes if models else 0
    saving = models[0].checkpoint_bytes(config.checkpoint.keep) if models else 0
    if models:
        found.append(attempt("data", lambda: inputs.data(config, models[0].tokenizer)))
    else:
        found.append(skipped("data", "model"))
    found.append(attempt("tasks", lambda: inputs.tasks(config)))
    found.append(attempt("memory", lambda: machine.memory(loading)))
    if "://" in config.run.directory:
        found.append(attempt("storage", lambda: machine.bucket(config.run.directory)))
        here = buckets.folder_here(config.run.directory)
        return [*found, attempt("disk", lambda: machine.room(here, saving))]
    directory = Path(config.run.directory).expanduser().absolute()
    found.append(attempt("storage", lambda: machine.storage(directory)))
    found.append(attempt("disk", lambda: machine.room(directory, saving)))
    if found[-2].status == "ok":
        found.append(attempt("disk's clock", lambda: machine.clock(directory)))
    return found


def _write(path: Path, found: Sequence[Finding], code: int) -> None:
    content = {"exit_code": code, "findings": [one.to_dict() for one in found]}
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise errors.ResourceError(
            f"cannot write {path}: {error.strerror or error}; give another --json"
        ) from error


if __name__ == "__main__":
    errors.run_cli(lambda: main(sys.argv[1:]), leave=command.leave)
