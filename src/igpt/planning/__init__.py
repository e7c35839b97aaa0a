"""Estimates made before a run starts."""
