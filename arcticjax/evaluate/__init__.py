"""Scores an encoder on retrieval tasks, whole and compressed, and reports."""
