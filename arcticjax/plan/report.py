"""A plan as text and as JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from arcticjax.parallel.hlo import Collective
from arcticjax.plan.planner import Plan


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; the fields are described in docs/plan.md."""
    projection = plan.projection
    batch = plan.config.train.global_batch
    return {
        "fits": plan.fits,
        "hbm_bytes_per_chip": plan.memory_bytes,
        "hbm_capacity_bytes": plan.capacity,
        "hbm_parts": plan.parts,
        "refused": plan.train.refused,
        "model_flops_per_step": plan.model_flops,
        "collectives": [
            {
                "op": one.op,
                "axis": _axis(one, plan.mesh),
                "bytes": one.bytes,
                "in_loop": one.in_loop,
                "purpose": one.purpose,
            }
            for one in plan.train.collectives
        ],
        "compiled_shapes": plan.programs,
        "fill": plan.load.fill,
        "tokens_per_step": plan.load.tokens,
        "microbatches_used": plan.load.microbatches,
        "projected_step_seconds": projection and projection.step,
        "pairs_per_second": projection and batch / projection.step,
        "projection": projection
        and {
            "compute_seconds": projection.compute,
            "memory_seconds": projection.memory,
            "network_seconds": projection.network,
            "efficiency": projection.efficiency,
            "mfu": projection.mfu,
        },
        "run": _run(plan),
        "topology": plan.target.name,
        "devices": plan.devices,
        "device_kind": plan.device_kind,
        "mesh": plan.mesh,
        "global_batch": batch,
        "model": plan.spec_name,
        "notes": plan.notes,
    }


def to_text(plan: Plan, file: str) -> str:
    """The plan as lines for a reader."""
    shapes, batch = plan.shapes, plan.config.train.global_batch
    known = plan.capacity is not None
    room = f" of {_size(plan.capacity)}" if plan.capacity is not None else ""
    verdict = ("fits" if known else "compiles") if plan.fits else "does NOT fit"
    lines = [
        f"plan     {file} on {plan.target.name} ({plan.devices} x {plan.device_kind}): {verdict}, "
        f"{_size(plan.memory_bytes)}{room} a device",
        f"model    {plan.spec_name}",
        f"step     {batch:,} pairs, {shapes.pairs} a device; microbatches of {shapes.rows} rows of "
        f"{shapes.row_length} tokens, {plan.load.microbatches:.1f} of at most "
        f"{shapes.microbatches} in use; passes {plan.passes}; fill {100 * plan.load.fill:.1f} %",
        *_ladder(plan),
        "memory   "
        + ", ".join(
            f"{name.replace('_', ' ')} {_size(size)}" for name, size in plan.parts.items() if size
        ),
    ]
    if plan.train.refused is not None:
        lines.append(f"refused  {plan.train.refused}")
    lines.append(f"flops    {_flops(plan.model_flops)} of the model in a step")
    lines += [_collective(one, plan.mesh) for one in plan.train.collectives if one.bytes > 4]
    scalars = sum(1 for one in plan.train.collectives if one.bytes <= 4)
    if scalars:
        lines.append(f"network  {scalars} collectives of one number each")
    lines += _time(plan)
    if plan.evaluation_memory:
        lines.append(
            f"scoring  {_size(plan.evaluation_memory)} a device, with what the run keeps meanwhile"
        )
    for one in plan.programs:
        lines.append("compiles " + ", ".join(f"{name} {value}" for name, value in one.items()))
    lines += [f"assumes  {note}" for note in plan.notes]
    return "\n".join(lines)


def _time(plan: Plan) -> list[str]:
    projection = plan.projection
    if projection is None:
        why = "the program does not fit" if plan.train.refused else "no table has this device"
        return [f"time     not projected: {why}"]
    batch = plan.config.train.global_batch
    lines = [
        f"time     {1000 * projection.step:.1f} ms a step projected, "
        f"{batch / projection.step:,.0f} pairs/s, {100 * projection.mfu:.0f} % of the peak in "
        f"model FLOPs: compute {1000 * projection.compute:.1f} ms with matrix units at "
        f"{100 * projection.efficiency:.0f} % (assumed; --efficiency), memory traffic "
        f"{1000 * projection.memory:.1f} ms, network {1000 * projection.network:.1f} ms, not hidden"
    ]
    run = _run(plan)
    if run:
        lines.append(
            f"run      {run['steps']:,} steps: {run['hours']:.1f} h, {run['chip_hours']:,.0f} "
            "chip-hours, by that projection"
        )
    return lines


def _run(plan: Plan) -> Mapping[str, Any] | None:
    if plan.projection is None or plan.total_steps is None:
        return None
    hours = plan.total_steps * plan.projection.step / 3600
    return {"steps": plan.total_steps, "hours": hours, "chip_hours": hours * plan.devices}


def _collective(one: Collective, mesh: Mapping[str, int]) -> str:
    loop = ", in a loop" if one.in_loop else ""
    # Combined collectives have the names of all that they carry.
    purposes = dict.fromkeys(re.findall(r"\w+(?=$|[:)]+)", one.purpose))
    purpose = f" ({', '.join(purposes)})" if purposes else ""
    return f"network  {one.op} over {_axis(one, mesh)}: {_size(one.bytes)}{loop}{purpose}"


def _axis(one: Collective, mesh: Mapping[str, int]) -> str:
    return ",".join(one.axes(mesh)) or "other"


def _size(size: int | float) -> str:
    for unit, limit in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= limit:
            return f"{size / limit:.2f} {unit}"
    return f"{size:.0f} B"


def _ladder(plan: Plan) -> list[str]:
    if not plan.shapes.ladder:
        return []
    rungs = " or ".join(map(str, plan.shapes.ladder))
    return [f"ladder   up to {rungs} rows at once: {100 * plan.load.at_once:.0f} % of the steps"]


def _flops(value: float) -> str:
    for unit, limit in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g} FLOP"


def advice(settings: Sequence[Sequence[str]]) -> str:
    """What to try next, one line each."""
    if not settings:
        return "try      a larger slice"
    return "\n".join(f"try      {' '.join(f'--set {one}' for one in each)}" for each in settings)


def largest(plan: Plan | None) -> str:
    """The largest global batch in a line."""
    if plan is None:
        return "largest  no global batch that was tried fits"
    return (
        f"largest  --set train.global_batch={plan.config.train.global_batch}: "
        f"{_size(plan.memory_bytes)}, passes {plan.passes}"
    )
