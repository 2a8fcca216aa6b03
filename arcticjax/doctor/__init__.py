"""Checks a machine, a pod and a config before a run is paid for."""
