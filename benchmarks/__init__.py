"""Measurements, each one command: `python -m benchmarks.<name>`. Nothing here asserts a time."""
