"""Run by test_loss.py in a process of 8 devices: the loss over all of them is that of one."""

import jax
import jax.numpy as jnp
import numpy as np

from core.loss import IGNORE, cross_entropy
from core.sharding import make_mesh, parse_mesh
from tests.checks import require

rng = np.random.default_rng(0)
hidden = jnp.asarray(rng.standard_normal((16, 9, 24)), jnp.float32)


def run(mesh, table, targets):
    def loss(hidden, table):
        sums = cross_entropy(hidden, table, targets, z_loss=0.01, chunk=4, mesh=mesh)
        return sums.total / 7, sums

    gradients, sums = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden, table)
    forward_only = jax.jit(lambda h, t: cross_entropy(h, t, targets, chunk=4, mesh=mesh).nll)(hidden, table)
    return *sums, *gradients, forward_only


require(jax.device_count() == 8, jax.devices())
# 101 rows cannot be divided over `tensor`, and are not.
for vocabulary, texts in (
    (104, ("data=8", "data=2,fsdp=2,tensor=2", "data=2,tensor=4")),
    (101, ("fsdp=4,tensor=2",)),
):
    table = jnp.asarray(rng.standard_normal((vocabulary, 24)), jnp.float32)
    targets = rng.integers(0, vocabulary, (16, 9))
    targets[:5] = IGNORE  # some devices have nothing to count, one only half
    ends = np.arange(0, vocabulary, 26)  # of the parts that four devices, or two, have of 104 rows
    targets[6, :8] = np.concatenate([ends, ends + 25])[:8] % vocabulary
    targets = jnp.asarray(targets)
    one = run(None, table, targets)
    for text in texts:
        mesh = make_mesh(parse_mesh(text, 8))
        for a, b in zip(run(mesh, table, targets), one, strict=True):
            # Up to the order of summation: a few roundings of 6e-8.
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
            require(len(a.devices()) == 8, text, a.devices())
    # What is not in the vocabulary is no token's, also where each device sees a part of it.
    loss = run(mesh, table, targets.at[7, 2].set(vocabulary))[0]
    require(np.isnan(loss), loss)
