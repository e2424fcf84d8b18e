"""Run by test_watch.py in a process of 4 devices: any mesh shows of an update what one device shows."""

import jax
import jax.numpy as jnp
import numpy as np

from core.config import ModelConfig
from core.model import Compute
from core.run.schedule import OptimizerConfig
from core.sharding import batch_sharding, make_mesh, parse_mesh, replicated
from tests.checks import require
from tests.kernels import REFERENCE
from train_tpu.step import Batch, Controls, GuardConfig, StepConfig, compile_step, fresh_state
from train_tpu.watch import record_of

MODEL = ModelConfig(
    vocab_size=64, context=16, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, qk_norm=True, d_mlp=48
)
ROWS = 8


def record(name: str, kernels: bool) -> dict:
    """Of the first update, in two micro-batches, of Muon: AdamW has the embedding."""
    shape = parse_mesh(name, 4 if name != "data=1" else 1)
    mesh = make_mesh(shape, jax.devices()[: shape.data * shape.fsdp * shape.tensor])
    config = StepConfig(
        MODEL, OptimizerConfig(optimizer="muon", eps=1e-3), GuardConfig(),
        Compute(remat="dots", mesh=mesh, kernels=REFERENCE if kernels else None), 0.0, 20, watches=True,
    )  # fmt: skip
    step = compile_step(config, ROWS, 2, mesh)
    values = (jnp.float32(0.01), jnp.float32(8), jnp.int32(3), jnp.uint32(7), jnp.bool_(True))
    tokens = np.random.default_rng(0).integers(0, 64, (2, ROWS // 2, 17)).astype(np.uint16)
    index = np.arange(ROWS, dtype=np.uint32).reshape(2, -1)
    batch = jax.device_put(Batch(tokens, np.zeros(index.shape, bool), index), batch_sharding(mesh))
    _, metrics = step(
        fresh_state(config, mesh, 3), batch, jax.device_put(Controls(*values), replicated(mesh))
    )
    found = jax.device_get(metrics)
    return record_of(found.seen, found.leaf_norms, ROWS // 2, MODEL.context, MODEL.d_model)


one = record("data=1", False)
require(min(one["update"]) > 0 and min(one["entropy"]) > 0, one)
for name, kernels in (("data=4", False), ("data=4", True), ("fsdp=4", False), ("fsdp=2,tensor=2", False)):
    for field, values in record(name, kernels).items():
        # 4 digits are kept, half a unit of which is 5e-4 of a value on either side.
        np.testing.assert_allclose(values, one[field], rtol=1.1e-3, err_msg=f"{name}: {field}")
    print(f"{name}{' with kernels' * kernels}: as one device")
