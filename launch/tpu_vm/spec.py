"""What runs on which TPU VMs."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from launch.specs import Positive, Spec, Text

# Software versions for JAX: docs.cloud.google.com/tpu/docs/runtimes.
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}


class TpuVmSpec(Spec):
    """A run on TPU VMs. The run directory must lie in a bucket or on a disk that all workers share
    (`nfs`), unless the slice is one worker."""

    zone: Text = Field(description="Such as us-west4-a.")
    project: Text | None = Field(default=None, description="Left out: gcloud's own setting.")
    accelerator: Annotated[str, Field(pattern=r"^[a-z0-9]+-[0-9]+$")] = Field(
        description="Kind and size of a slice as Google Cloud counts it, such as v5litepod-16."
    )
    runtime: Text | None = Field(
        default=None, description="Software version; left out: the one for the accelerator."
    )
    slices: Positive = Field(default=1, description="So many slices, joined by the network.")
    spot: bool = Field(default=False, description="Cheaper, and may be taken away at any time.")
    nfs: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]+$")] | None = Field(
        default=None, description="SERVER:/SHARE, mounted at /mnt/arcticjax on every worker."
    )
    env_file: Text | None = Field(
        default=None,
        description="Local file of NAME=value lines for the workers' environment: tokens go here.",
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.runtime is None and self.kind not in RUNTIMES:
            raise ValueError(
                f"accelerator: for {self.kind} no software version is known; name it as runtime"
            )
        return self

    @property
    def kind(self) -> str:
        """The accelerator without its size."""
        return self.accelerator.partition("-")[0]

    @property
    def software(self) -> str:
        """The software version that the VMs boot."""
        return self.runtime or RUNTIMES[self.kind]
