"""Parts of the engine of JAX that need no run."""

import jax
import jax.numpy as jnp
import numpy as np

from core.sharding import make_mesh
from tests.compilations import listen
from train_tpu.engine import own_copy


def test_the_copy_for_samples_is_compiled_once():
    mesh, params = make_mesh(devices=jax.devices()[:1]), {"table": jnp.arange(3.0)}
    own_copy(params, mesh)
    compilations = listen()
    copied = [own_copy(params, mesh), own_copy(params, make_mesh(devices=jax.devices()[:1]))]
    assert not compilations
    assert all(np.asarray(copy["table"]).tolist() == [0.0, 1.0, 2.0] for copy in copied)
