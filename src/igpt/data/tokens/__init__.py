"""Token data sets on disk, and batches of them."""
