"""`bench.step`: its rows train, in the type that the device computes in, on what PyTorch's rows are given."""

import math

import jax
import numpy as np
import pytest
import torch

from bench import plain_jax
from bench.plain_torch import GPT
from bench.step import PLAIN, StepBenchConfig, measure
from bench.train_rows import measure as measure_torch
from core.config import ModelConfig
from core.errors import UserError
from tests.models import BOTH, GROUPED, LLAMA
from tests.train_tpu.processes import refusal_here


@pytest.mark.slow
@pytest.mark.parametrize("who", [PLAIN, "auto/preset"])
def test_a_row_trains(who: str):
    """Fresh weights of standard deviation 0.02 tell no token from another: the loss is the logarithm of the
    vocabulary, and after an update lower on a batch that it has seen."""
    row = measure(StepBenchConfig(steps=3), "mtlm1-tiny", GROUPED, 2, who)
    assert row["batch"] == 2 and row["first_loss"] == pytest.approx(math.log(GROUPED.vocab_size), abs=0.3)
    assert row["loss"] < row["first_loss"] and row["ms"] > 0 and row["peak"] is None
    assert row["kernels"].startswith("xla") and (row["device"], row["attention"][-3:]) == ("cpu", "xla")


@pytest.mark.slow
def test_both_engines_are_given_the_same(monkeypatch: pytest.MonkeyPatch):
    """The same weights, tokens, number of updates and rate: seven updates of 64 targets leave float32's
    rounding, which Adam's first updates, of size lr whatever the gradient, amplify to 1e-4 at most."""
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    of_jax = measure(StepBenchConfig(steps=2, optimizer="adamw"), "mtlm1-tiny", LLAMA, 2, "auto/preset")
    of_torch = measure_torch(LLAMA, 2, "ours-no-kernels", 2, torch.device("cpu"), None)
    assert of_jax["first_loss"] == pytest.approx(of_torch["first_loss"], rel=1e-6)
    assert of_jax["loss"] == pytest.approx(of_torch["loss"], rel=1e-4)
    assert of_jax["loss"] < of_jax["first_loss"] - 0.01


@pytest.mark.parametrize("kind", BOTH | {"grouped": GROUPED})
def test_plain_jax_is_the_same_function(kind: str):
    """As plain PyTorch's, which is ours; every weight matters, biases too. Both in float32: some hundred
    roundings of 6e-8 of a loss of about 5."""
    config: ModelConfig = (BOTH | {"grouped": GROUPED})[kind]
    init, step = plain_jax.make(config, "xla", "float32")
    params, state = init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    assert sum(leaf.size for leaf in leaves) == config.n_params
    rng = np.random.default_rng(0)
    leaves = [leaf + rng.normal(0, 0.2, leaf.shape).astype(np.float32) for leaf in leaves]
    params = jax.tree.unflatten(tree, leaves)
    other = plain_torch_of(config, jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), params))
    tokens = rng.integers(config.vocab_size, size=(2, config.context + 1))
    ids = torch.from_numpy(tokens)
    loss = step(params, state, tokens.astype(np.int32))[2]
    assert float(loss) == pytest.approx(other(ids[:, :-1], ids[:, 1:]).item(), rel=1e-5)


def plain_torch_of(config: ModelConfig, params: dict) -> GPT:
    """`bench.plain_torch` with plain JAX's parameters."""
    model, layers = GPT(config), params["layers"]
    with torch.no_grad():
        for n, block in enumerate(model.blocks):
            for name in ("qkv", "o", "up", "down"):
                linear = getattr(block, name)
                linear.weight.copy_(layers[name][n].T)
                if linear.bias is not None:
                    linear.bias.copy_(layers[f"{name}_bias"][n])
            for name in ("norm1", "norm2", *(("q_norm", "k_norm") if config.qk_norm else ())):
                getattr(block, name).weight.copy_(layers[name][n])
        model.embed.weight.copy_(params["embed"])
        model.norm.weight.copy_(params["norm"])
        if model.positions is not None:
            model.positions.weight.copy_(params["positions"])
        if not config.tied:
            model.head.weight.copy_(params["head"].T)
    return model


def test_products_of_a_gpu_are_not_named_where_there_is_none():
    with pytest.raises(UserError, match="--products cublas is of a GPU, and JAX runs on a cpu"):
        measure(StepBenchConfig(), "mtlm1-tiny", GROUPED, 2, "auto/cublas")


def test_presets_for_a_gpu_are_not_tried_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    """The 40M's batch takes 84 GiB there."""
    monkeypatch.setattr("bench.step.in_process", lambda *_: {"platform": "cpu"})
    assert "--preset mtlm1-tiny --batch 4 tries" in refusal_here(module="bench.step")
