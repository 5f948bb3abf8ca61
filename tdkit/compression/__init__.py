"""From a model and a goal to a compressed model."""
