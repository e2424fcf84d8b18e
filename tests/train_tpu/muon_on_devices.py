"""Run by test_meshes.py in a process of 8 devices: each computes its share of Muon's products, none twice."""

import dataclasses
from collections import Counter

import jax
import numpy as np

from core.config import ModelConfig
from core.run.schedule import OptimizerConfig
from core.sharding import make_mesh, parse_mesh, state_shardings
from tests.checks import require
from tests.models import flat, random_params
from tests.train_tpu.products import muon_flops, muon_products
from train_tpu.aot.hlo import Module
from train_tpu.optimizer import make_optimizer

# 8 devices divide neither the 12 square matrices (or 6 and 6) nor the 9 of the MLP.
LLAMA = ModelConfig(vocab_size=64, context=16, d_model=32, n_layers=3, n_heads=4, d_mlp=48)
GROUPED = dataclasses.replace(LLAMA, n_kv_heads=1, head_dim=6)
MATRICES = {
    LLAMA: {(32, 32): 12, (32, 48): 9},
    GROUPED: {(24, 32): 6, (6, 32): 6, (32, 48): 9},
}
GATHERED, EXCHANGED = "all-gather", "all-to-all"
# How often, for each shape, results are gathered, and parts exchanged for matrices and back.
COLLECTIVES = {
    "data=8": {GATHERED: 1},
    "fsdp=8": {EXCHANGED: 2},
    "fsdp=4,tensor=2": {EXCHANGED: 4},
    "data=2,fsdp=2,tensor=2": {EXCHANGED: 4, GATHERED: 1},
    "data=2,tensor=4": {EXCHANGED: 2, GATHERED: 1},
}


def update(model: ModelConfig, text: str):
    """One update from random moments on a mesh of 8 devices, or on one, and its compiled module."""
    n = 1 if text == "data=1" else 8
    mesh = make_mesh(parse_mesh(text, n), jax.devices()[:n])
    optimizer = make_optimizer(OptimizerConfig(), "float32", mesh)
    params, gradients = (random_params(model, seed) for seed in (0, 1))
    state = optimizer.init(params)
    given = gradients, state, params
    given = jax.tree.map(jax.device_put, given, state_shardings(mesh, given))
    out = jax.tree.map(lambda leaf: leaf.sharding, given[:2])
    compiled = jax.jit(optimizer.update, out_shardings=out).lower(*given).compile()
    updates, state = compiled(*given)
    return flat(updates), flat(state), Module(compiled.as_text())


require(jax.device_count() == 8, jax.devices())
for model, matrices in MATRICES.items():
    one, moments, module = update(model, "data=1")
    require(sum(n for _, n in muon_products(module)) == muon_flops(matrices, 1), model)
    for text, expected in COLLECTIVES.items():
        split, moments_split, module = update(model, text)
        n = sum(n for _, n in muon_products(module))
        if (model, text) == (
            GROUPED,
            "data=2,tensor=4",
        ):  # which have keys and values whole: 4 does not divide 6
            expected = {EXCHANGED: 2 * 2, GATHERED: 3}
        else:
            expected = {kind: times * len(matrices) for kind, times in expected.items()}
        require(n == muon_flops(matrices, 8), model, text, n)
        found = Counter(c.kind for c in module.collectives(8))
        require(found == expected, model, text, found)
        for name in one:
            # Equal products in another batch: a rounding of float32, 6e-8, in singular values that the
            # iteration multiplies by up to 3.4^5 = 490; an update is 1 at most.
            np.testing.assert_allclose(split[name], one[name], rtol=0, atol=3e-5, err_msg=f"{text}: {name}")
        for name in moments:
            np.testing.assert_allclose(moments_split[name], moments[name], rtol=1e-6, err_msg=name)
