"""Starts the stages of arcticjax where they run: this machine, TPU VMs, GKE, Slurm, SkyPilot.

Nothing in arcticjax imports this. docs/launching.md is its guide.
"""
