"""What runs on which nodes of a cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from launch.specs import Name, Positive, Spec, Text

# Node label cloud.google.com/gke-tpu-accelerator, sides of a topology, and chips of a node in
# slices of several (docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus; machine types
# ct5lp-hightpu-4t, ct5p-hightpu-4t, ct6e-standard-4t).
_CHIPS_OF_A_NODE = 4


@dataclass(frozen=True)
class TpuKind:
    """A TPU generation as GKE knows it."""

    label: str
    sides: int


TPU_KINDS = {
    "v5e": TpuKind("tpu-v5-lite-podslice", 2),
    "v5p": TpuKind("tpu-v5p-slice", 3),
    "v6e": TpuKind("tpu-v6e-slice", 2),
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Tpu(_Part):
    """Slices of one kind."""

    kind: Literal["v5e", "v5p", "v6e"]
    topology: Annotated[str, Field(pattern=r"^[1-9][0-9]*(x[1-9][0-9]*){1,2}$")] = Field(
        description="Chips along each side of a slice, such as 4x4."
    )
    slices: Positive = 1
    chips_per_node: Literal[1, 4, 8] | None = Field(
        default=None, description="Left out: all of a slice of up to 4 chips, else 4."
    )

    @model_validator(mode="after")
    def _divides(self) -> Self:
        sides = TPU_KINDS[self.kind].sides
        if self.topology.count("x") + 1 != sides:
            raise ValueError(f"topology: a slice of {self.kind} has {sides} sides")
        if self.slice_chips % self.chips:
            raise ValueError(
                f"topology: {self.slice_chips} chips do not divide into nodes of {self.chips}"
            )
        if self.slices > 1 and self.nodes == 1:
            # cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice
            raise ValueError("slices: GKE joins slices of several nodes only; take a larger one")
        return self

    @property
    def slice_chips(self) -> int:
        """Chips of one slice."""
        return math.prod(map(int, self.topology.split("x")))

    @property
    def chips(self) -> int:
        """Chips of one node."""
        return self.chips_per_node or min(_CHIPS_OF_A_NODE, self.slice_chips)

    @property
    def nodes(self) -> int:
        """Nodes of one slice."""
        return self.slice_chips // self.chips


class Gpu(_Part):
    """Nodes with GPUs; one process uses all of a node's."""

    accelerator: Text = Field(description="Label of the nodes, such as nvidia-h100-80gb.")
    per_node: Positive = 8
    nodes: Positive = 1


class Cpu(_Part):
    """Nodes without an accelerator."""

    nodes: Positive = 1
    cores: Positive = 4
    memory_gib: Positive = 16


class GkeSpec(Spec):
    """A run on GKE: exactly one of `tpu`, `gpu` and `cpu`."""

    image: Text = Field(description="Container image with the source tree (launch/gke/Dockerfile).")
    namespace: Name = "default"
    queue: Name | None = Field(default=None, description="Kueue's LocalQueue; left out: no queue.")
    tpu: Tpu | None = None
    gpu: Gpu | None = None
    cpu: Cpu | None = None
    spot: bool = False
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=20, description="Of the whole run, after preemptions and lost peers."
    )
    volume_claim: Name | None = Field(
        default=None, description="A ReadWriteMany claim, mounted at /mnt/arcticjax in every pod."
    )
    secret: Name | None = Field(
        default=None, description="A Kubernetes secret whose entries are environment variables."
    )
    service_account: Name | None = None
    grace_seconds: Annotated[int, Field(ge=30, le=3600)] = Field(
        default=120, description="From SIGTERM to SIGKILL; spot nodes may give less."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [name for name in ("tpu", "gpu", "cpu") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of tpu, gpu and cpu (given: {', '.join(given) or 'none'})")
        return self

    @property
    def groups(self) -> int:
        """Jobs of the JobSet: TPU slices, else one."""
        return self.tpu.slices if self.tpu is not None else 1

    @property
    def nodes(self) -> int:
        """Pods of one job: one a node."""
        for part in (self.tpu, self.gpu, self.cpu):
            if part is not None:
                return part.nodes
        raise AssertionError("no kind of node")
