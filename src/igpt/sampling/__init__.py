"""Generate images with a model."""
