"""Training of the mirror: what port_torch.train and port_torch.finetune share.

The loop, the order of the data, schedule, run folder and log are those of core/run and core/data, which JAX's
trainer uses too.
"""
