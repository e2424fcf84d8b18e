"""AdamW against torch, Muon against numpy layer by layer, and the schedules at their landmarks."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import train_tpu.muon
from core.errors import UserError
from core.run.schedule import OptimizerConfig, learning_rate
from tests.kernels import REFERENCE
from tests.models import BOTH, GPT, flat, random_params
from train_tpu.optimizer import apply_gradients, make_optimizer

STEPS = 20


@functools.cache
def gradients_of(config, step: int):
    return random_params(config, seed=100 + step, std=0.1)


def rate(step: int) -> float:
    return 0.01 * (1 + step % 3)


def train(model, config: OptimizerConfig, steps: int = STEPS, kernels=None):
    """Parameters after some steps of given gradients, at rates that differ; the third is refused at first."""
    params = random_params(model)

    @jax.jit
    def update(params, state, gradients, norm, lr, ok):
        return apply_gradients(config, gradients, norm, params, state, lr, ok, kernels=kernels)

    state = make_optimizer(config).init(params)
    for step in range(steps):
        factor = 1 + step % 4  # which clipping takes away; one that never changed would cancel
        gradients = jax.tree.map(lambda g, factor=factor: factor * g, gradients_of(model, step))
        inputs = gradients, jnp.float32(factor * config.clip), jnp.float32(rate(step))
        if step == 2:
            refused = update(params, state, *inputs, jnp.array(False))
            jax.tree.map(np.testing.assert_array_equal, refused, (params, state))
        params, state = update(params, state, *inputs, jnp.array(True))
    return flat(params)


def torch_adamw(model, config: OptimizerConfig, names, steps: int = STEPS):
    """The same of torch.optim.AdamW, float64, with the decaying and the other leaves in two groups."""
    start = flat(random_params(model))
    leaves = {k: torch.tensor(start[k], dtype=torch.float64) for k in names}
    decayed = [v for k, v in leaves.items() if k.endswith(("kernel", "table"))]
    others = [v for k, v in leaves.items() if k.endswith(("scale", "bias"))]
    assert len(decayed) + len(others) == len(leaves)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(config.beta1, config.beta2), eps=config.eps,
    )  # fmt: skip
    for step in range(steps):
        gradients = flat(gradients_of(model, step))
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(gradients[name], dtype=torch.float64)
        for group in optimizer.param_groups:
            group["lr"] = rate(step) * config.adamw_lr_ratio
        optimizer.step()
    return {k: v.numpy() for k, v in leaves.items()}


# Twenty updates of up to 0.03, each with a few float32 roundings of 6e-8 of itself, added to parameters
# of about 1, which round by as much: 20 * 6e-8 at worst. Bias correction takes 1 - 0.95^t, off by 1e-6.
ADAM_TOLERANCE = {"rtol": 0, "atol": 2e-6}


@pytest.mark.parametrize(
    "kind, kernels",
    [("gpt", None), ("gpt", REFERENCE), pytest.param("llama", None, marks=pytest.mark.slow)],
    ids=["gpt", "gpt-kernels", "llama"],
)
def test_adamw_equals_torch(kind, kernels):
    config = OptimizerConfig(optimizer="adamw", weight_decay=0.3, beta1=0.8, eps=1e-6)
    found = train(BOTH[kind], config, kernels=kernels)
    expected = torch_adamw(BOTH[kind], config, found.keys())
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[name], **ADAM_TOLERANCE, err_msg=name)


def newton_schulz(m: np.ndarray) -> np.ndarray:
    """Keller Jordan's quintic iteration, five times, on one matrix, float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = m / (np.linalg.norm(m) + 1e-8)
    x = x.T if m.shape[0] > m.shape[1] else x
    for _ in range(5):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if m.shape[0] > m.shape[1] else x


def numpy_muon(model, config: OptimizerConfig, name: str, steps: int):
    """Muon with Nesterov momentum on one stacked leaf, one layer after the other, float64."""
    result = []
    for layer, w in enumerate(flat(random_params(model))[name].astype(np.float64)):
        average = np.zeros_like(w)
        for step in range(steps):
            g = flat(gradients_of(model, step))[name][layer].astype(np.float64)
            beta = config.momentum
            average = beta * average + (1 - beta) * g
            # Both averages are freed of their bias towards the zero at the start; the iteration
            # divides by the norm, so only their proportion matters.
            ahead = beta * average / (1 - beta ** (step + 2)) + (1 - beta) * g / (1 - beta ** (step + 1))
            update = 0.2 * max(w.shape) ** 0.5 * newton_schulz(ahead)
            w = w - rate(step) * (update + config.weight_decay * w)
        result.append(w)
    return np.stack(result)


def test_muon_moves_the_matrices_of_every_layer_by_itself():
    config = OptimizerConfig(optimizer="muon", weight_decay=0.3)
    found = train(GPT, config, steps=5)
    matrices = {k for k in found if k.startswith("layers/") and k.endswith("kernel")}
    assert len(matrices) == 6  # q, k, v, o, up, down; wide, tall and square
    for name in matrices:
        # Updates have an RMS of about 0.2 times a rate of up to 0.03. The iteration multiplies small
        # singular values, and the rounding of 6e-8 in them, by up to 3.4^5 = 490: 3e-5 of an update.
        expected = numpy_muon(GPT, config, name, 5)
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=5 * 0.006 * 3e-5, err_msg=name)


def test_matrices_of_one_shape_are_one_product():
    """Each product of Jordan's formula once, in bfloat16, for all layers' matrices of a shape."""
    params = random_params(GPT)
    optimizer = make_optimizer(OptimizerConfig(optimizer="muon"), "bfloat16")
    jaxpr = jax.make_jaxpr(optimizer.update)(params, optimizer.init(params), params)
    products = [e.outvars[0].aval for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    square, wide = (12, 48, 48), (6, 48, 80)  # q, k, v, o; up, and down turned round; 3 layers
    grams = (6, 48, 48)
    assert Counter(p.shape for p in products) == {square: 5 * 3, grams: 5 * 2, wide: 5}
    assert {p.dtype for p in products} == {jnp.dtype("bfloat16")}


ORTHOGONALIZED = jax.jit(train_tpu.muon.newton_schulz)
SPECTRA = {
    "even": np.linspace(0.5, 1, 64),
    "ill-conditioned": np.geomspace(1e-4, 1, 64),
    "one large": np.array([0.002] * 63 + [1.0]),
    "low rank": np.array([0.0] * 56 + [1.0] * 8),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("columns", [64, 192])
def test_orthogonal_in_bfloat16(spectrum, columns):
    """In the directions of the singular vectors, as in float64."""
    rng = np.random.default_rng(0)
    u, _, v = np.linalg.svd(rng.standard_normal((64, columns)), full_matrices=False)
    sizes = SPECTRA[spectrum]
    x = (u * sizes) @ v
    found = np.asarray(ORTHOGONALIZED(jnp.asarray(x[None], jnp.bfloat16))[0], np.float64)
    expected = newton_schulz(x)
    # Rounding x, and dividing it by its norm, puts noise of rms 2^-9/sqrt(3) of an element on it each time:
    # its largest singular value is the following. Singular values ten times as large keep nine tenths of
    # their direction, and so of what the iteration makes of them; smaller ones are what they can be: bounded.
    noise = np.sqrt(2 / 3) * 2.0**-9 * np.linalg.norm(x) * (64**-0.5 + columns**-0.5)
    kept = sizes > 10 * noise
    assert kept.any()
    along = [np.einsum("mi,mk,ik->i", u, matrix, v)[kept] for matrix in (found, expected)]
    np.testing.assert_allclose(*along, rtol=0.1)
    # The largest that the iteration makes of any is 1.203; 15 roundings of 2^-9 are 3%.
    assert np.linalg.norm(found, 2) < 1.203 * 1.03


@pytest.mark.parametrize(
    "kernels", [REFERENCE, pytest.param(None, marks=pytest.mark.slow)], ids=["kernels", "xla"]
)
def test_muon_leaves_the_rest_to_adamw(kernels):
    config = OptimizerConfig(optimizer="muon", adamw_lr_ratio=0.7, weight_decay=0.3)
    found = train(GPT, config, kernels=kernels)
    rest = {k for k in found if not (k.startswith("layers/") and k.endswith("kernel"))}
    assert {"embed/table", "positions/table", "head/kernel", "norm/scale", "layers/mlp/up/bias"} < rest
    for name, leaf in torch_adamw(GPT, config, rest).items():
        np.testing.assert_allclose(found[name], leaf, **ADAM_TOLERANCE, err_msg=name)


def test_muon_updates_are_the_size_of_adams():
    config = OptimizerConfig(optimizer="muon", weight_decay=0.0)
    before, after = flat(random_params(GPT)), train(GPT, config, steps=1)
    for name in ("layers/attn/q/kernel", "layers/mlp/up/kernel", "layers/mlp/down/kernel"):
        rms = np.sqrt(((after[name] - before[name]) ** 2).mean()) / rate(0)
        # An orthogonal [m, n] has an RMS of 1 / sqrt(max(m, n)); the iteration's singular values lie
        # within 0.7 and 1.2.
        assert 0.2 * 0.7 < rms < 0.2 * 1.2


# --- schedules ---

WSD = OptimizerConfig(lr=2.0, warmup=10, schedule="wsd", decay=0.2, final_lr=0.1)
COSINE = dataclasses.replace(WSD, schedule="cosine")


@pytest.mark.parametrize("config", [WSD, COSINE])
def test_warmup_is_linear_to_the_peak(config):
    rates = [learning_rate(config, step, 100) for step in range(11)]
    np.testing.assert_allclose(rates, [0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.0])


def test_wsd():
    assert {learning_rate(WSD, step, 100) for step in range(10, 81)} == {2.0}
    last = [learning_rate(WSD, step, 100) for step in range(80, 101)]
    # The twenty steps from 80 on fall evenly towards 0.2, which would be the rate of a step 100.
    np.testing.assert_allclose(last, np.linspace(2.0, 0.2, 21))
    assert learning_rate(WSD, 250, 100) == pytest.approx(0.2)
    assert learning_rate(dataclasses.replace(WSD, decay=0.0), 99, 100) == 2.0


def test_cosine():
    rates = np.array([learning_rate(COSINE, step, 100) for step in range(10, 101)])
    assert rates[0] == 2.0 and rates[45] == pytest.approx(1.1) and rates[90] == pytest.approx(0.2)
    assert (np.diff(rates) < 0).all()
    np.testing.assert_allclose(rates + rates[::-1], 2.2)  # as much above the middle as below it
    assert learning_rate(COSINE, 250, 100) == pytest.approx(0.2)


def test_no_warmup_and_a_run_shorter_than_its_warmup():
    assert learning_rate(dataclasses.replace(WSD, warmup=0), 0, 100) == 2.0
    assert learning_rate(COSINE, 3, 4) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": 0.0}, {"lr": -1.0}, {"lr": float("nan")}, {"eps": 0.0}, {"beta1": 1.0}, {"beta2": -0.1},
        {"momentum": 1.0}, {"decay": 1.1}, {"final_lr": -0.1}, {"clip": -1.0}, {"weight_decay": -0.1},
        {"warmup": -1}, {"clip": float("nan")}, {"lr": float("inf")},
        {"weight_decay": float("nan")}, {"adamw_lr_ratio": 0.0},
        {"adamw_lr_ratio": 2.0, "optimizer": "adamw"},
    ],
)  # fmt: skip
def test_bad_settings(bad):
    with pytest.raises(UserError, match=next(iter(bad)).replace("_", "-")) as caught:
        OptimizerConfig(**bad)
    assert "\n" not in str(caught.value)


def test_a_restarted_schedule_is_one_of_the_steps_left():
    plain = OptimizerConfig(lr=1.0, warmup=10, decay=0.2)
    restarted = dataclasses.replace(plain, schedule_start=40)
    for schedule in ("wsd", "cosine"):
        a, b = (dataclasses.replace(c, schedule=schedule) for c in (plain, restarted))
        assert [learning_rate(b, s, 140) for s in range(40, 140)] == [
            learning_rate(a, s, 100) for s in range(100)
        ]


def test_rewarming_scales_the_schedule_linearly():
    plain = OptimizerConfig(lr=1.0, warmup=0, decay=0.5)
    warmed = dataclasses.replace(plain, rewarm=20, rewarm_at=40)
    expected = [learning_rate(plain, s, 100) * (1 if s < 40 else min(1, (s - 39) / 20)) for s in range(100)]
    assert [learning_rate(warmed, s, 100) for s in range(100)] == pytest.approx(expected)
