"""Training of the mirror: what port_torch.train and port_torch.finetune share.

It imports `train_tpu`'s order of the data, schedule, run folder, log and progress instead of copying them:
the global batch must be the same function of (seed, index) in both trainers, and one definition proves it.
None of what is imported touches a JAX device.
"""
