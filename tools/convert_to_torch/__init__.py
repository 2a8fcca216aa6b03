"""From a run's checkpoint, or a model folder, to a sentence-transformers folder."""
