"""Decode, transform and quantize images."""
