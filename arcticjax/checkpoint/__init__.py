"""Checkpoints that are verified before they are believed, and the directory of a run."""

from arcticjax.checkpoint.lease import Lease
from arcticjax.checkpoint.run_directory import RunDirectory
from arcticjax.checkpoint.store import CheckpointStore, Restored

__all__ = ["CheckpointStore", "Lease", "Restored", "RunDirectory"]
