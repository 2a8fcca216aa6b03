"""Runs under Slurm, on GPUs or CPUs, requeued after preemption and before the time limit."""
