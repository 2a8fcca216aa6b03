"""Pure builders of the compiled programs: train step, encode, search; state and optimiser."""
