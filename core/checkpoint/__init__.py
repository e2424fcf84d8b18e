"""Checkpoints: which there are, what each holds, how they are written and verified."""
