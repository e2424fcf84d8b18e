"""Run by test_loss.py in a process of 8 devices: the loss over all of them is that of one."""

import jax
import jax.numpy as jnp
import numpy as np

from core.loss import IGNORE, cross_entropy
from core.sharding import make_mesh

rng = np.random.default_rng(0)
hidden = jnp.asarray(rng.standard_normal((16, 9, 24)), jnp.float32)
table = jnp.asarray(rng.standard_normal((101, 24)), jnp.float32)
targets = rng.integers(0, 101, (16, 9))
targets[:5] = IGNORE  # two devices have nothing to count, one only half
targets = jnp.asarray(targets)


def run(mesh):
    def loss(hidden, table):
        sums = cross_entropy(hidden, table, targets, z_loss=0.01, chunk=4, mesh=mesh)
        return sums.total / 7, sums

    gradients, sums = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden, table)
    forward_only = jax.jit(lambda h, t: cross_entropy(h, t, targets, chunk=4, mesh=mesh).nll)(hidden, table)
    return *sums, *gradients, forward_only


mesh = make_mesh()
assert mesh.size == 8, mesh
for one, eight in zip(run(None), run(mesh), strict=True):
    # Up to the order of summation: a few roundings of 6e-8.
    np.testing.assert_allclose(eight, one, rtol=2e-6, atol=2e-6)
    assert len(eight.devices()) == 8
