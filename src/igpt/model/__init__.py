"""The transformer, its objectives, its files and its samples."""
