"""A plan: what one config needs and costs on one target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from arcticjax.config import RunConfig
from arcticjax.data.layout import Shapes
from arcticjax.parallel import mesh as meshes
from arcticjax.plan import costs, retrieval, topology, workload
from arcticjax.plan.compile import Compiled, compile_program, device_bytes
from arcticjax.scoring import beir, retrieve
from arcticjax.step import activations, embedder, search
from arcticjax.step import program as programs

# Documents of a retrieval task that is not on this machine.
ASSUMED_DOCUMENTS = 100_000


@dataclass(frozen=True)
class Plan:
    """What a config needs and costs on a target; bytes are of one device.

    parts: the memory of the training step by what it holds. programs: every compiled program, as
    `result.json` of a run lists them, with its memory. projection: None where the target's limits
    are not known. evaluation_memory: of the largest program of scoring, beside what a run keeps.
    """

    target: topology.Target
    config: RunConfig
    devices: int
    device_kind: str
    mesh: dict[str, int]
    capacity: int | None
    train: Compiled
    parts: dict[str, int]
    programs: list[dict[str, Any]]
    load: workload.Load
    model_flops: float
    projection: costs.Projection | None
    total_steps: int | None
    spec_name: str
    notes: list[str]
    shapes: Shapes
    passes: str
    evaluation_memory: int = 0

    @property
    def fits(self) -> bool:
        """Whether every program fits into a device's memory, as far as its size is known."""
        refused = any(one.get("refused") for one in self.programs)
        return self.train_fits and not refused and self._has_room_for(self.evaluation_memory)

    @property
    def train_fits(self) -> bool:
        """Whether the training step alone does."""
        return self.train.refused is None and self._has_room_for(self.memory_bytes)

    @property
    def keeps_activations(self) -> bool:
        """Whether the step keeps those of a whole batch, at least of batches that a rung holds."""
        return self.passes == "one" or bool(self.shapes.ladder)

    @property
    def tasks_too_large(self) -> list[str]:
        """Tasks of the config whose search does not fit."""
        searches = [one for one in self.programs if one["program"] == "search"]
        return [
            task
            for task, one in zip(self.config.evaluation.tasks, searches, strict=False)
            if one.get("refused") or not self._has_room_for(retrieval.needed([one]))
        ]

    def _has_room_for(self, size: int) -> bool:
        return self.capacity is None or size <= self.capacity

    @property
    def memory_bytes(self) -> int:
        """Memory of the training step."""
        return self.train.memory_bytes


class Planner:
    """Plans configs for one target, keeping what was compiled."""

    def __init__(
        self,
        target: topology.Target,
        *,
        lengths: tuple[float, float] | None = None,
        efficiency: float | None = None,
    ) -> None:
        self.target = target
        self._devices = topology.open_devices(target)
        self._lengths = lengths
        self._efficiency = efficiency
        self._steps: dict[Any, Compiled] = {}

    def plan(self, config: RunConfig, *, evaluation: bool = True) -> Plan:
        """Compiles what a config runs and works out what it costs.

        evaluation: also compile what scoring runs, if the config has tasks. Raises ConfigError for
        a config that this target cannot run.
        """
        mesh = meshes.make_mesh(
            config.mesh.data,
            config.mesh.fsdp,
            self.target.slices(config.mesh.slices),
            among=self._devices,
        )
        programs.check_global_batch(config.train.global_batch, mesh.devices.size)
        work = workload.describe(config, self._lengths)
        shapes = programs.choose_shapes(config, work.spec, work.views, work.draw, work.sides, mesh)
        capacity, counted = topology.memory(self.target), topology.memory_note(self.target)
        work.notes.extend([counted] if counted else [])
        with jax.set_mesh(mesh):
            program, train = self._train_step(work, shapes, mesh, capacity)
            shapes = program.shapes
            load = workload.expected_load(work, shapes)
            listed = [retrieval.entry(program.announcement(), train)]
            if evaluation and train.refused is None:
                listed += self._evaluation(work, mesh, program)
        if program.declined_bytes is not None:
            work.notes.append(
                f"passes: two, because one would keep {program.declined_bytes / 2**30:.2f} GiB of "
                "activations, more than a quarter of a device's memory; --set train.passes=one "
                "computes a quarter less, if that fits"
            )
        state = program.abstract_state()
        state_bytes = device_bytes(state)
        projection = None
        if self.target.chip is not None and train.refused is None:
            projection = costs.project(
                work.spec,
                shapes,
                load,
                self.target,
                train.collectives,
                passes=program.encoding.passes,
                precision_bytes=jnp.dtype(config.train.precision).itemsize,
                state_bytes=state_bytes,
                efficiency=self._efficiency,
                guide=work.guide,
            )
        return Plan(
            target=self.target,
            config=config,
            devices=mesh.devices.size,
            device_kind=mesh.devices.flat[0].device_kind,
            mesh=dict(mesh.shape),
            capacity=capacity,
            train=train,
            parts=_parts(program, train, state),
            programs=listed,
            load=load,
            model_flops=costs.model_flops(work.spec, load, config.train.global_batch),
            projection=projection,
            total_steps=work.total_steps,
            spec_name=workload.spec_name(work.spec),
            notes=work.notes,
            shapes=shapes,
            passes=program.encoding.passes,
            evaluation_memory=retrieval.needed(listed[1:]),
        )

    def _train_step(
        self, work: workload.Workload, shapes: Shapes, mesh: Mesh, capacity: int | None
    ) -> tuple[programs.Program, Compiled]:
        # The number of steps is a constant of the schedule; without data any will do.
        optimizer = work.config.optimizer
        steps = work.total_steps or optimizer.warmup_steps + (optimizer.decay_steps or 0) + 1
        program = programs.build(
            work.config,
            work.spec,
            work.spec.pooling,
            shapes,
            mesh,
            steps,
            capacity,
            work.guide and (work.guide, work.guide.pooling),
        )
        key = (
            work.config.model_dump_json(exclude={"run"}),
            program.shapes,
            program.encoding.passes,
        )
        arguments = (program.abstract_state(), program.abstract_buffers(), program.abstract_batch())
        if key not in self._steps:
            self._steps[key] = compile_program(
                f"the training step ({_describe(program)})",
                program.lower(*arguments),
                (*arguments, program.abstract_guide()),
            )
        return program, self._steps[key]

    def _evaluation(
        self, work: workload.Workload, mesh: Mesh, program: programs.Program
    ) -> list[dict[str, Any]]:
        """What scoring compiles; the state of the run and its buffers stay where they are."""
        tasks = work.config.evaluation.tasks
        if not tasks:
            return []
        state = program.abstract_state()
        resident = device_bytes((state, program.abstract_buffers(), program.abstract_guide()))
        devices, width = mesh.devices.size, work.spec.hidden_size
        # While it encodes, the run's own parameters are those of the program, unless their matrices
        # are shared.
        own = device_bytes(state["params"]) if mesh.shape["fsdp"] == 1 else 0
        named, done = retrieval.compile_encode(
            work.spec, mesh, embedder.row_length(work.sides), work.config.train.precision
        )
        whole = device_bytes(
            meshes.lying(programs.Encoder(work.spec).abstract(), meshes.replicated(mesh))
        )
        found = [retrieval.entry(named, done, resident - own)]
        for task, documents, queries in _tasks(tasks, work.notes):
            sizes = search.shapes(queries, documents, retrieve.RECALL_DEPTH, devices)
            done = retrieval.compile_search(
                f"search of {task}",
                mesh,
                width,
                *(sizes[name] for name in ("queries", "documents_per_device", "tile", "top_k")),
            )
            named = {"program": "search", "task": task, **sizes}
            found.append(retrieval.entry(named, done, resident + whole - own))
        return found


def _tasks(names: list[str], notes: list[str]) -> list[tuple[str, int, int]]:
    """(name, documents, queries) of each task."""
    found = []
    for name in names:
        folder = Path(name.removeprefix("beir:"))
        if name.startswith("beir:") and folder.is_dir():
            task = beir.load_task(folder)
            judged = sum(1 for query in task.query_ids if task.qrels.get(query))
            found.append((task.name, len(task.documents), judged))
        else:
            found.append((name, ASSUMED_DOCUMENTS, search.QUERY_BLOCK))
            notes.append(
                f"evaluation: {name} is not on this machine; {ASSUMED_DOCUMENTS:,} documents"
            )
    return found


def _describe(program: programs.Program) -> str:
    shapes = program.shapes
    return (
        f"{shapes.devices} devices, {shapes.pairs} pairs each, microbatches of {shapes.rows} rows "
        f"of {shapes.row_length}, passes {program.encoding.passes}"
        + (f", ladder of {', '.join(map(str, shapes.ladder))} rows" if shapes.ladder else "")
    )


def _parts(program: programs.Program, done: Compiled, state: Any) -> dict[str, int]:
    """The step's memory by what it holds; temporaries cut into what is known of them and the
    rest."""
    params = device_bytes(state["params"])
    width, shapes = program.encoder.spec.hidden_size, program.shapes
    guide, guided = program.abstract_guide(), 0
    if program.guide is not None:
        guided = program.guide.encoder.spec.hidden_size
    # With the gradients of what is trained.
    gathered = shapes.devices * shapes.documents * (2 * width + guided) * 4
    accumulated = program.encoder.spec.parameter_count() * 4
    rest = done.temporary_bytes - gathered - accumulated
    known = {
        "parameters": params,
        "optimizer": device_bytes(state["optimizer"]),
        **({"guide": device_bytes(guide)} if guide is not None else {}),
        "kept_activations": activations.buffer_bytes(program.kept),
        "batch": device_bytes(program.abstract_batch()),
    }
    # Where the compiler found a better way than these sizes, temporaries stay in one piece.
    inside = (
        {"gathered_documents": gathered, "gradients": accumulated, "other_temporaries": rest}
        if rest >= 0
        else {"temporaries": done.temporary_bytes}
    )
    parts = {**known, **inside, "code": done.code_bytes}
    # Arrays lie padded to whole tiles.
    return {**parts, "padding": max(0, done.memory_bytes - sum(parts.values()))}
