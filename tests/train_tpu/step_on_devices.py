"""Run by test_step.py in a process of 8 devices: training over all of them is training on one."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from core.config import ModelConfig
from core.model import Compute
from core.run.schedule import OptimizerConfig
from core.sharding import batch_sharding, make_mesh, replicated
from tests.checks import require
from train_tpu.step import Batch, Controls, GuardConfig, StepConfig, compile_step, fresh_state

optimizer = sys.argv[1]
ROWS, ACCUMULATE, STEPS = 32, 2, 5
MODEL = ModelConfig(
    vocab_size=61, context=16, d_model=32, n_layers=2, n_heads=2, d_mlp=48, dropout=0.1,
    positions="learned", mlp="gelu", biases=True, tied=False,
)  # fmt: skip


def train(devices):
    """Losses, norms and parameters of a few steps."""
    mesh = make_mesh(devices=devices)
    # See test_step.py for the large eps.
    config = StepConfig(
        MODEL, OptimizerConfig(optimizer=optimizer, eps=1e-3), GuardConfig(), Compute(mesh=mesh),
        z_loss=1e-3, loss_chunk=16,
    )  # fmt: skip
    step = compile_step(config, ROWS, ACCUMULATE, mesh)
    state = fresh_state(config, mesh, seed=3)
    controls = Controls(jnp.float32(0.01), jnp.float32(8), jnp.int32(3), jnp.uint32(7))
    controls = jax.device_put(controls, replicated(mesh))
    before, seen = jax.tree.map(np.asarray, state.params), []
    for i in range(STEPS):
        rng = np.random.default_rng(i)
        tokens = rng.integers(0, 61, (ACCUMULATE, ROWS // ACCUMULATE, 17)).astype(np.uint16)
        ignored = rng.random((ACCUMULATE, ROWS // ACCUMULATE)) < 0.1
        index = np.arange(i * ROWS, (i + 1) * ROWS, dtype=np.uint32).reshape(ACCUMULATE, -1)
        batch = jax.device_put(Batch(tokens, ignored, index), batch_sharding(mesh))
        state, metrics = step(state, batch, controls)
        require(metrics.applied, i, metrics)
        seen.append((float(metrics.loss), float(metrics.nll), float(metrics.grad_norm)))
    after = jax.tree.map(np.asarray, state.params)
    moved = np.abs(after["embed"]["table"] - before["embed"]["table"]).max()
    require(moved > 0.005, moved)
    return np.array(seen), after


require(jax.device_count() == 8, jax.devices())
one, params = train(jax.devices()[:1])
eight, other = train(jax.devices())
# Sums in another order: a few roundings of 6e-8. Muon raises what is small in a gradient to full size,
# rounding included: its iteration multiplies small singular values by up to 3.4^5 = 470.
tolerance = {"adamw": 3e-6, "muon": 1e-4}[optimizer]
np.testing.assert_allclose(eight, one, rtol=tolerance)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), other, params)
