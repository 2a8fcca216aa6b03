"""A mining run from start to finish: claim the output, load the teacher, embed, search, report."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from arcticjax.buckets import must_be_on_disk
from arcticjax.checkpoint import lease
from arcticjax.checkpoint.agreement import from_primary
from arcticjax.checkpoint.lock_file import LockFile
from arcticjax.config import MineConfig
from arcticjax.data import candidates, record_files
from arcticjax.errors import ConfigError, ResourceError
from arcticjax.mine import inputs, report, statistics
from arcticjax.mine.files import explained, write_json
from arcticjax.mine.inputs import Pool
from arcticjax.mine.progress import Progress, say
from arcticjax.mine.search import Search, block_size
from arcticjax.mine.teacher import Teacher, load_teacher
from arcticjax.mine.vectors import Vectors, embed
from arcticjax.parallel import compilation_cache, distributed, fingerprint
from arcticjax.parallel import mesh as meshes
from arcticjax.parallel.peers import Peers
from arcticjax.parallel.stop import StopSignal
from arcticjax.step.embedder import Side

BEGUN = "inputs.json"
LOCK = "mine.lock"
# Tokenising takes long, and not equally long everywhere.
_PREPARING_SECONDS = 6 * 3600.0


def run(config: MineConfig) -> Path:
    """Mines as `config` says and returns the folder of the candidates.

    What is there already is not made again. Raises an ArcticError, whose exit codes are part of the
    command line's contract. SIGTERM is one of them, Preempted.
    """
    must_be_on_disk("output", config.output)
    output = Path(os.path.expanduser(config.output))
    with StopSignal(lambda: _saved(output)), contextlib.ExitStack() as stack:
        distributed.start(config.mesh.platform, config.mesh.policy)
        compilation_cache.keep_compiled(config.compilation_cache)
        _check_alike(config)
        check_lease = _claim(output, stack)
        stack.enter_context(Peers(config.mesh.peer_seconds, output))
        mesh = meshes.make_mesh(config.mesh.data)
        stack.enter_context(jax.set_mesh(mesh))
        teacher = load_teacher(config)
        cache = Path(config.cache).expanduser() if config.cache else output / "cache"
        pools = inputs.open_pools(config, cache, teacher.tokenizer)
        begun = _identity(config, teacher, pools)
        fingerprint.check("before mining", lambda: begun, patience_seconds=_PREPARING_SECONDS)
        from_primary(lambda: _begin(output, begun))
        if from_primary(lambda: (output / candidates.MANIFEST).exists()):
            say(f"{output}: was finished before")
        else:
            _mine(config, output, teacher, pools, mesh, check_lease)
        if distributed.talks():
            _report(config, output, pools)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("arcticjax mine done")
    return output


def _mine(
    config: MineConfig,
    output: Path,
    teacher: Teacher,
    pools: list[Pool],
    mesh: Any,
    check_lease: Callable[[], None],
) -> None:
    progress = Progress(check_lease)
    embedder = teacher.embedder(mesh, config.precision)
    say(
        f"teacher {teacher.source.origin}, {embedder.dimension} numbers a text, on "
        f"{mesh.devices.size} device(s)"
    )
    folder = output / "embeddings"
    if distributed.talks():
        with explained(folder):
            folder.mkdir(exist_ok=True)
    searches = []
    for pool in pools:
        vectors: dict[Side, Vectors] = {}
        sides: tuple[tuple[Side, inputs.Texts], ...] = (
            ("query", pool.queries),
            ("document", pool.documents),
        )
        for side, texts in sides:
            vectors[side] = Vectors(
                folder, f"{pool.name}-{side}", len(texts), config.shard, embedder.dimension
            )
            done = embed(embedder, texts, side, vectors[side])
            progress.follow(f"{pool.name}: {side} embeddings", done, len(texts))
        block = block_size(
            config.document_block, len(pool.documents), embedder.dimension, mesh.devices.size
        )
        search = Search(
            pool=pool,
            queries=vectors["query"],
            documents=vectors["document"],
            output=output,
            pieces=output / "search" / pool.name,
            top_k=config.top_k,
            block=block,
            mesh=mesh,
        )
        searches.append(search)
        progress.follow(
            f"{pool.name}: search among {len(pool.documents):,} documents in "
            f"{len(search.blocks)} block(s)",
            search.run(),
            len(pool.queries) * len(search.blocks),
        )
    if distributed.talks():
        _finish(config, output, teacher, pools, searches)


def _finish(
    config: MineConfig,
    output: Path,
    teacher: Teacher,
    pools: list[Pool],
    searches: list[Search],
) -> None:
    """Writes the manifest, last of all."""
    groups, files = [], {}
    for pool, search in zip(pools, searches, strict=True):
        names = [search.file(shard).name for shard in range(search.queries.shards)]
        files |= {name: record_files.file_facts(output / name) for name in names}
        groups.append(
            {
                "name": pool.name,
                "sources": list(pool.sources),
                "kind": pool.kind,
                "queries": len(pool.queries),
                "documents": len(pool.documents),
                "sha256": pool.fingerprint,
                "files": names,
            }
        )
    manifest = {
        "format": candidates.FORMAT,
        "version": candidates.FORMAT_VERSION,
        "teacher": {
            "name": config.teacher,
            "sha256": teacher.sha256,
            "tokenizer_sha256": teacher.tokenizer.sha256,
            "precision": config.precision,
            "contract": teacher.source.contract.to_dict(),
        },
        "top_k": config.top_k,
        "corpus": config.corpus,
        # Where the texts are, for whoever wants to read them.
        "inputs": [one.model_dump(mode="json") for one in inputs.inputs_of(config)],
        "groups": groups,
        "files": files,
    }
    write_json(output / candidates.MANIFEST, manifest)
    say(
        f"{output}: candidates of {sum(len(pool.queries) for pool in pools):,} queries in "
        f"{len(files)} file(s)"
    )


def _report(config: MineConfig, output: Path, pools: list[Pool]) -> None:
    """Writes the report, unless it is there."""
    folder = output / report.FOLDER
    if not (folder / report.MARKDOWN).exists():
        opened = candidates.open_candidates(output)
        settings = config.report
        found = [
            statistics.collect(
                opened,
                pool,
                minimum=settings.negatives,
                queries=settings.queries,
                depth=settings.depth,
                examples=settings.examples,
            )
            for pool in pools
        ]
        report.write_report(folder, opened.manifest, found)
    say(f"{folder / report.MARKDOWN}: the report; report.html beside it needs no other file")


def _identity(config: MineConfig, teacher: Teacher, pools: list[Pool]) -> dict[str, Any]:
    """What the results depend on, by the names that a user knows."""
    return {
        "teacher": f"sha256 {teacher.sha256}",
        "tokenizer": f"sha256 {teacher.tokenizer.sha256}",
        "contract": teacher.source.contract.to_dict(),
        "precision": config.precision,
        "top_k": config.top_k,
        "corpus": config.corpus,
        "shard": config.shard,
        "input": {pool.name: f"sha256 {pool.fingerprint}" for pool in pools},
    }


def _begin(output: Path, begun: dict[str, Any]) -> None:
    """Notes what the folder is made from; refuses one that was begun with anything else."""
    path = output / BEGUN
    if not path.exists():
        write_json(path, begun)
        return
    try:
        before = fingerprint.flatten(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}), so nothing can tell what the folder was begun "
            "with; set another output"
        ) from None
    now = fingerprint.flatten(begun)
    changed = [
        f"\n  {name}: {before.get(name, 'absent')!r} in the folder, {now.get(name, 'absent')!r} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ConfigError(
            f"output: {output} was begun with something else:{''.join(changed)}\n"
            "Give the old values to go on with it, or set another output"
        )


def _check_alike(config: MineConfig) -> None:
    def values() -> dict[str, Any]:
        fields = config.model_dump(exclude={"output", "cache", "compilation_cache"})
        devices = jax.local_devices()
        return {
            **fields,
            "code": fingerprint.code_version(),
            "devices": f"{len(devices)} x {devices[0].device_kind}",
        }

    fingerprint.check("at the start", values)


def _claim(output: Path, stack: contextlib.ExitStack) -> Callable[[], None]:
    """Makes the output folder and claims it, on process 0; gives a check that the claim stands."""
    checks: list[Callable[[], None]] = []

    def claim() -> None:
        try:
            output.mkdir(parents=True, exist_ok=True)
            held = lease.claim(LockFile(output / LOCK), field="output")
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(
                f"output: {output} is or runs through a file; set another folder"
            ) from None
        except OSError as error:
            raise ResourceError(
                f"output: {output} cannot be written ({error.strerror or error}); change its "
                "permissions or set another folder"
            ) from None
        checks.append(stack.enter_context(held).check)

    from_primary(claim)
    return checks[0] if checks else lambda: None


def _saved(output: Path) -> str:
    """What a run that is stopped now would go on from."""
    whole = len(list((output / "embeddings").glob("[!.]*.npy")))
    searched = len(list(output.glob("candidates-*.parquet")))
    return (
        f"{output} holds {whole} shard(s) of embeddings and {searched} of candidates; the same "
        "command goes on from there"
    )
