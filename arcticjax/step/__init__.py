"""Pure builders of the compiled programs: train step, encode, search; the state and the optimiser."""
