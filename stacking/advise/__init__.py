"""When to grow, measured: growing at a checkpoint compared with training on, at equal FLOPs."""
