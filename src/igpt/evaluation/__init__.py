"""What a model has learned: features, probes, likelihood."""
