"""Run by test_meshes.py in a process of 8 devices: training on any mesh is training on one device."""

import dataclasses
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from core.config import ModelConfig
from core.documents import DocumentMark, number_documents
from core.model import Compute
from core.run.schedule import OptimizerConfig
from core.sharding import MeshShape, batch_sharding, make_mesh, parse_mesh, replicated
from tests.checks import require
from tests.kernels import REFERENCE
from tests.models import flat
from tests.packed import scores64
from train_tpu.step import Batch, Controls, GuardConfig, StepConfig, compile_step, fresh_state

kind, optimizer, dtype, kernels, log = sys.argv[1:]
ROWS, SEED = 16, 3
LLAMA = ModelConfig(vocab_size=64, context=16, d_model=32, n_layers=2, n_heads=4, d_mlp=48)
GPT = dataclasses.replace(LLAMA, positions="learned", mlp="gelu", biases=True, tied=False)
MODEL = {
    "llama": LLAMA,
    "gpt": GPT,
    "odd": dataclasses.replace(GPT, vocab_size=61),
    "grouped": dataclasses.replace(LLAMA, n_kv_heads=2, qk_norm=True),  # tensor=4 does not divide the heads
}[kind]
MESHES = ("data=8", "fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2", "tensor=2", "data=2,tensor=4")
MARK = DocumentMark(1, twice=False) if kind in ("odd", "grouped") else None
"""Where documents begin, for two of the kinds; rows of the others are one each."""
BETA = 0.9
KERNELS = REFERENCE if kernels == "kernels" else None


def data(step: int, grad_accum_steps: int) -> Batch:
    """A batch of random rows, of which some do not count."""
    rng = np.random.default_rng(step)
    shape = (grad_accum_steps, ROWS // grad_accum_steps)
    tokens = rng.integers(0, MODEL.vocab_size, (*shape, MODEL.context + 1)).astype(np.uint16)
    tokens[rng.random(tokens.shape) < 0.2] = 1
    index = np.arange(step * ROWS, (step + 1) * ROWS, dtype=np.uint32).reshape(shape)
    return Batch(tokens, rng.random(shape) < 0.1, index)


def train(shape: MeshShape, model=MODEL, grad_accum_steps=1, remat="none", unroll=1):
    """Losses and norms of two steps, the gradient of the first, and the parameters before and after."""
    n = shape.data * shape.fsdp * shape.tensor
    mesh = make_mesh(shape, jax.devices()[:n])
    # See test_step.py for the large eps.
    config = StepConfig(
        model, OptimizerConfig(optimizer=optimizer, eps=1e-3, beta1=BETA, momentum=BETA, clip=0.0),
        GuardConfig(), Compute(dtype, "xla", unroll, remat, mesh, KERNELS), z_loss=1e-3, loss_chunk=20,
        documents=MARK,
    )  # fmt: skip
    step = compile_step(config, ROWS, grad_accum_steps, mesh)
    state = fresh_state(config, mesh, SEED)
    controls = Controls(jnp.float32(0.01), jnp.float32(8), jnp.int32(3), jnp.uint32(7))
    controls = jax.device_put(controls, replicated(mesh))
    before, seen, gradients = flat(state.params), [], {}
    for i in range(2):
        state, metrics = step(
            state, jax.device_put(data(i, grad_accum_steps), batch_sharding(mesh)), controls
        )
        require(metrics.applied, shape, i, metrics)
        seen.append((float(metrics.loss), float(metrics.nll), float(metrics.grad_norm)))
        if i == 0:  # from zero, the first moment of both optimizers is (1 - beta) of the gradient
            for path, moment in flat(state.opt_state).items():
                for name in before:
                    if path.endswith(f"mu/{name}"):
                        gradients[name] = moment / (1 - BETA)
    require(gradients.keys() == before.keys(), gradients.keys(), before.keys())
    return np.array(seen), gradients, before, flat(state.params)


def gradients64(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first step's gradient by the formulas, in float64."""
    leaves = {
        name: torch.tensor(leaf, dtype=torch.float64, requires_grad=True) for name, leaf in params.items()
    }
    batch = data(0, 1)
    tokens = batch.tokens[0].astype(np.int64)
    inputs = tokens[:, :-1]
    documents = number_documents(inputs, MARK)
    scores = scores64(MODEL, leaves, inputs, np.zeros_like(inputs) if documents is None else documents)
    lse = scores.logsumexp(-1)
    nll = lse - scores.gather(-1, torch.tensor(tokens[:, 1:, None]))[..., 0]
    counted = torch.tensor(~batch.ignored[0])
    (nll + 1e-3 * lse**2)[counted].mean().backward()
    return {name: leaf.grad.numpy() for name, leaf in leaves.items()}


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(np.linalg.norm(one[name] - other[name])) for name in one}


require(jax.device_count() == 8, jax.devices())
# XLA says on stderr where it can only go on by giving every device everything; Python keeps the old one.
sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
ONE = MeshShape()
seen, gradients, before, after = train(ONE)
noise = distance(gradients, gradients64(before))
size = {name: float(np.linalg.norm(g)) for name, g in gradients.items()}
# What float32 does to a gradient, measured on one device: about 1e-7 of it, and of a leaf whose gradient is 0
# (the bias of k) the same part of its neighbours'. A mesh adds the same numbers in another order: its own
# error is another draw of that size, so that the two differ by sqrt(2) of it; 4 leaves room for small leaves.
# bfloat16 rounds at 2^-9 where float32 does at 2^-24; a sum over `tensor` adds parts that are rounded to it,
# a few roundings more of the size of one device's own.
ROUNDING = {"float32": 1.0, "bfloat16": 2.0**15}[dtype]
require(all(noise[name] < 2e-6 * ROUNDING * max(size[name], 0.1) for name in noise), noise)
if dtype == "bfloat16":  # that it is computed in it: at least one rounding of each matrix's gradient
    require(all(noise[name] > 2.0**-9 * size[name] for name in noise if name.endswith("kernel")), noise)
# The two updates amplify it: AdamW divides it by eps = 1e-3; Muon raises what is small in a gradient to full
# size, rounding included (its iteration multiplies small singular values by up to 3.4^5 = 470).
amplified = {"adamw": 3e-6, "muon": 1e-4}[optimizer]


def check(name, results, expected):
    losses, gradient, start, end = results
    losses1, gradient1, start1, end1 = expected
    for leaf in start:
        np.testing.assert_array_equal(start[leaf], start1[leaf], err_msg=f"{name}: {leaf} at the start")
    apart = distance(gradient, gradient1)
    worst = max(apart, key=lambda leaf: apart[leaf] / noise[leaf])
    print(f"{name}: {apart[worst] / noise[worst]:.2f} of one device's own error at most, in {worst}")
    require(apart[worst] <= 4 * noise[worst], name, worst, apart[worst], noise[worst])
    if (
        dtype == "bfloat16"
    ):  # logits are float32, of activations that are off by 2^-9; a step hardly changes that
        np.testing.assert_allclose(losses[:, :2], losses1[:, :2], rtol=2.0**-9, err_msg=name)
        return
    np.testing.assert_allclose(losses[0], losses1[0], rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(losses[1], losses1[1], rtol=amplified, err_msg=name)
    for leaf in end:
        np.testing.assert_allclose(end[leaf], end1[leaf], rtol=0, atol=amplified, err_msg=f"{name}: {leaf}")
    moved = np.abs(end["embed/table"] - start["embed/table"]).max()
    require(moved > 0.005, moved)


for text in MESHES:
    check(text, train(parse_mesh(text, 2 if text == "tensor=2" else 8)), (seen, gradients, before, after))
if dtype == "bfloat16":
    sys.exit()
dropped = dataclasses.replace(MODEL, dropout=0.2)
harder = train(ONE, dropped, grad_accum_steps=2)
require(abs(harder[0][0, 0] - seen[0, 0]) > 1e-4, harder[0][0, 0], seen[0, 0])  # the masks count
# Masks, parts of the batch and what is computed again.
for text, remat, unroll in (
    ("fsdp=8", "dots", 2),
    ("data=2,fsdp=2,tensor=2", "full", 1),
    ("fsdp=4,tensor=2", "none", 2),
):
    check(f"{text} {remat}", train(parse_mesh(text, 8), dropped, 2, remat, unroll), harder)
said = Path(log).read_text()
require("full rematerialization" not in said, said)
