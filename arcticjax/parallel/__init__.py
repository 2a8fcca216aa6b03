"""Processes, the mesh, and how arrays lie on it."""
