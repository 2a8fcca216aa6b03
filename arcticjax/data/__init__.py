"""Stored sources, the draw of global batches, their layout in rows, and the input pipeline."""
