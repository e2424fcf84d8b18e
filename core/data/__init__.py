"""Text to training data: sources, splits, packing, the prepared dataset. Nothing here imports jax."""
