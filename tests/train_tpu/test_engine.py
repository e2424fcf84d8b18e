"""The engine of JAX: what it compiles once, and that no transfer between host and device is hidden in it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.config import ModelConfig
from core.data.batches import Batch as LoadedBatch
from core.run.guard import GuardConfig
from core.sharding import make_mesh, replicated
from tests.compilations import listen
from train_tpu import engine as module
from train_tpu.config import RunConfig
from train_tpu.engine import JaxEngine, own_copy
from train_tpu.step import Batch, Controls, Metrics, abstract_batch

GUARD = GuardConfig()
LOADED = LoadedBatch(
    tokens=np.ones((2, 9), np.uint16), first=0, records=np.arange(2), bad=np.zeros(2, np.bool_)
)


def test_the_copy_for_samples_is_compiled_once():
    mesh, params = make_mesh(devices=jax.devices()[:1]), {"table": jnp.arange(3.0)}
    own_copy(params, mesh)
    compilations = listen()
    copied = [own_copy(params, mesh), own_copy(params, make_mesh(devices=jax.devices()[:1]))]
    assert not compilations
    assert all(np.asarray(copy["table"]).tolist() == [0.0, 1.0, 2.0] for copy in copied)


@pytest.fixture
def engine() -> JaxEngine:
    """Its step sums up tokens."""
    mesh = make_mesh(devices=jax.devices()[:1])
    whole = replicated(mesh)

    def step(state, batch, controls):
        total = batch.tokens.sum() + controls.lr
        return state + total, Metrics(
            total, total, total, total > 0, controls.halt_after, controls.seed, {"leaf": total}
        )

    types = Controls(lr=jnp.float32, sigma=jnp.float32, halt_after=jnp.int32, seed=jnp.uint32)
    controls = jax.tree.map(lambda t: jax.ShapeDtypeStruct((), t, sharding=whole), types)
    state = jax.device_put(np.float32(0), whole)
    abstract = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    small = ModelConfig(vocab_size=258, context=8, d_model=8, n_layers=1, n_heads=1, d_mlp=8)
    lowered = jax.jit(step, out_shardings=whole).lower(abstract, abstract_batch(2, 1, small, mesh), controls)
    evaluator = SimpleNamespace(heldout={})
    config = RunConfig(batch=2, grad_accum_steps=1)
    return JaxEngine(config, mesh, state, lowered.compile(), evaluator, None, None, None)


def test_a_hidden_transfer_to_the_device_is_refused(engine: JaxEngine, monkeypatch):
    metrics = engine.read(engine.dispatch(LOADED, 0, 0.5, GUARD))
    assert (metrics.loss, metrics.applied, metrics.streak, metrics.skipped) == (18.5, True, 10, 0)
    on_host = Batch(np.ones((1, 2, 9), np.uint16), np.zeros((1, 2), np.bool_), np.ones((1, 2), np.uint32))
    monkeypatch.setattr(module, "place_batch", lambda *_: on_host)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        engine.dispatch(LOADED, 1, 0.5, GUARD)


@pytest.mark.gpu
def test_a_hidden_transfer_to_the_host_is_refused(engine: JaxEngine, monkeypatch):
    """On a CPU none is needed, and so none is caught."""
    pending = engine.dispatch(LOADED, 0, 0.5, GUARD)
    assert engine.read(pending).loss == 18.5
    monkeypatch.setattr(jax, "device_get", lambda tree: jax.tree.map(np.asarray, tree))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed device-to-host transfer"):
        engine.read(engine.dispatch(LOADED, 1, 0.5, GUARD))
