"""Draw images from a model."""
