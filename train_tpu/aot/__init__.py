"""`python -m train_tpu.aot`: the training step compiled ahead of time for a TPU slice, without a TPU."""
