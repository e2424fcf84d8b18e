"""No random key is used twice: JAX's own checker over initialisation, a training step and generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.config import ModelConfig
from core.generation import Generator
from core.keys import Purpose, make_key
from core.model import Compute, init_params
from core.run.guard import GuardConfig
from core.run.schedule import OptimizerConfig
from core.sampling import Sampling
from core.sharding import make_mesh
from train_tpu.step import Batch, Controls, StepConfig, fresh_state, train_step

MODEL = ModelConfig(
    vocab_size=258, context=8, d_model=16, n_layers=2, n_heads=2, d_mlp=16, positions="rope", mlp="swiglu",
    biases=False, tied=True, dropout=0.1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def checked():
    with jax.debug_key_reuse(True):
        yield


def test_a_key_that_is_used_twice_is_found():
    """Planted: the checker sees it, in a compiled function as well."""

    def draw(seed):
        key = make_key(seed, Purpose.DROPOUT)
        return jax.random.normal(key) + jax.random.uniform(key)

    for function in (draw, jax.jit(draw)):
        with pytest.raises(jax.errors.KeyReuseError):
            function(jnp.uint32(0))


def test_keys_of_different_seeds_purposes_and_indices_differ():
    """The checker follows keys from where they are made; that no two are made alike is shown here."""
    every = [
        (seed, purpose, index) for seed in (0, 1) for purpose in Purpose for index in (0, 1, 2, 2**32 - 1)
    ]
    made = {
        tuple(np.asarray(jax.random.key_data(make_key(s, p, jnp.uint32(i)))).tolist()) for s, p, i in every
    }
    assert len(made) == len(every) == 48


def test_initial_weights():
    jax.block_until_ready(init_params(MODEL, make_key(0, Purpose.INIT)))


def test_a_training_step_with_dropout():
    """Of two micro-batches, whose masks are drawn in a loop."""
    mesh = make_mesh(devices=jax.devices()[:1])
    config = StepConfig(MODEL, OptimizerConfig(optimizer="adamw"), GuardConfig(), Compute(), 0.0, 8192)
    shape = 2, 2
    batch = Batch(
        jnp.ones((*shape, 9), jnp.uint16),
        jnp.zeros(shape, bool),
        jnp.arange(4, dtype=jnp.uint32).reshape(shape),
    )
    controls = Controls(jnp.float32(0.1), jnp.float32(8), jnp.int32(10), jnp.uint32(0))
    state = fresh_state(config, mesh, 0)
    _, metrics = jax.jit(functools.partial(train_step, config))(state, batch, controls)
    assert np.isfinite(float(metrics.loss))


def test_generation():
    params = init_params(MODEL, make_key(0, Purpose.INIT))
    made = Generator(MODEL, Compute()).complete(params, [[1, 2], [3]], Sampling(seed=0), 4, 257)
    assert len(made) == 2
