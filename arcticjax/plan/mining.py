"""Plans of mining: the programs of `python -m arcticjax.mine` for so many queries and documents.

Disk and time are told by `python -m arcticjax.mine --plan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from arcticjax.config import MineConfig
from arcticjax.data import layout
from arcticjax.parallel import mesh as meshes
from arcticjax.plan import retrieval, topology, workload
from arcticjax.plan.compile import device_bytes
from arcticjax.step import search

# Compilations of one search for a block that fits, at most.
MOST_TRIES = 12

Load = Callable[[Sequence[str]], MineConfig]


@dataclass(frozen=True)
class MiningPlan:
    """What a mining config needs on a target; bytes are of one device.

    block: documents that the devices hold at once; programs: as in `planner.Plan`, with the memory
    that each takes beside the teacher.
    """

    target: topology.Target
    devices: int
    device_kind: str
    mesh: dict[str, int]
    capacity: int | None
    queries: int
    documents: int
    block: int
    top_k: int
    programs: list[dict[str, Any]]
    spec_name: str
    notes: list[str]

    @property
    def memory_bytes(self) -> int:
        """Memory of the largest program."""
        return retrieval.needed(self.programs)

    @property
    def fits(self) -> bool:
        """Whether every program fits, as far as a device's memory is known."""
        refused = any(one.get("refused") for one in self.programs)
        return not refused and (self.capacity is None or self.memory_bytes <= self.capacity)


def plan_mining(
    config: MineConfig, target: topology.Target, queries: int, documents: int
) -> MiningPlan:
    """Compiles what mining runs on a target. Raises ConfigError for a config that it cannot run."""
    mesh = meshes.make_mesh(
        config.mesh.data, slices=target.slices("auto"), among=topology.open_devices(target)
    )
    devices, capacity = mesh.devices.size, topology.memory(target)
    counted = topology.memory_note(target)
    notes = [counted] if counted else []
    spec, lengths = workload.encoder_sizes(
        "teacher", config.teacher, config.contract.pooling, notes
    )
    asked = config.contract
    longest = max(asked.query_length or lengths[0], asked.document_length or lengths[1])
    block = documents
    if config.document_block is not None:
        block = min(block, config.document_block)
    elif capacity is not None:
        block = min(block, search.fitting(capacity, spec.hidden_size, devices))
    k, (share, tile) = min(config.top_k, block), search.cut_block(block, documents, devices)
    with jax.set_mesh(mesh):
        row_length = layout.round_up(longest, layout.TOKENS_PER_SLOT)
        named, encode = retrieval.compile_encode(spec, mesh, row_length, config.precision)
        found = retrieval.compile_search(
            "search", mesh, spec.hidden_size, min(queries, config.shard), share, tile, k
        )
    params = device_bytes(meshes.lying(retrieval.Encoder(spec).abstract(), meshes.replicated(mesh)))
    searched = {"program": "search", "documents": block, "documents_per_device": share, "top_k": k}
    return MiningPlan(
        target=target,
        devices=devices,
        device_kind=mesh.devices.flat[0].device_kind,
        mesh=dict(mesh.shape),
        capacity=capacity,
        queries=queries,
        documents=documents,
        block=block,
        top_k=k,
        programs=[
            retrieval.entry(named, encode),
            retrieval.entry(searched, found, resident=params),
        ],
        spec_name=workload.spec_name(spec),
        notes=notes,
    )


def fit(
    plan: MiningPlan,
    load: Load,
    plan_it: Callable[[MineConfig], MiningPlan],
    say: Callable[[str], None],
) -> tuple[list[str], MiningPlan] | None:
    """The largest `document_block`, halved again and again, with which a plan fits; None where
    encoding is what does not, or none is found."""
    block = plan.block
    for _ in range(MOST_TRIES):
        if block == 1 or retrieval.needed(plan.programs[:1]) > (plan.capacity or math.inf):
            return None
        block = -(-block // 2)
        settings = [f"document_block={block}"]
        plan = plan_it(load(settings))
        verdict = "fits" if plan.fits else "does not fit"
        say(f"tried    {settings[0]}: {plan.memory_bytes / 2**30:.2f} GiB, {verdict}")
        if plan.fits:
            return settings, plan
    return None


def to_json(plan: MiningPlan) -> dict[str, Any]:
    """The plan as plain values; the fields are those of a training plan, as far as mining has
    them."""
    return {
        "fits": plan.fits,
        "hbm_bytes_per_chip": plan.memory_bytes,
        "hbm_capacity_bytes": plan.capacity,
        "compiled_shapes": plan.programs,
        "queries": plan.queries,
        "documents": plan.documents,
        "document_block": plan.block,
        "blocks": -(-plan.documents // plan.block),
        "topology": plan.target.name,
        "devices": plan.devices,
        "device_kind": plan.device_kind,
        "mesh": plan.mesh,
        "model": plan.spec_name,
        "notes": plan.notes,
    }


def to_text(plan: MiningPlan, file: str) -> str:
    """The plan as lines for a reader."""
    known = plan.capacity is not None
    room = f" of {plan.capacity / 2**30:.2f} GiB" if plan.capacity is not None else ""
    verdict = ("fits" if known else "compiles") if plan.fits else "does NOT fit"
    lines = [
        f"plan     {file} on {plan.target.name} ({plan.devices} x {plan.device_kind}): {verdict}, "
        f"{plan.memory_bytes / 2**30:.2f} GiB{room} a device",
        f"model    {plan.spec_name}",
        f"mining   {plan.queries:,} queries among {plan.documents:,} documents, "
        f"top {plan.top_k:,}, in {-(-plan.documents // plan.block)} block(s) of {plan.block:,}",
    ]
    for one in plan.programs:
        lines.append("compiles " + ", ".join(f"{name} {value}" for name, value in one.items()))
    return "\n".join([*lines, *(f"assumes  {note}" for note in plan.notes)])
