"""Runs on Google Kubernetes Engine: a JobSet, admitted by Kueue, on TPU slices, GPUs or CPUs."""
