"""What every training run has, whatever computes it: neither jax nor torch is imported here."""
