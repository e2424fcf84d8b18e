"""Does growing pay? Growth compared with training from scratch."""
