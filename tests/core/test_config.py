"""Sizes of the models: by the table of leaves, by their arrays, and as the design has them."""

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.checkpoint.checkpointer import flatten
from core.config import PRESETS, Mlp, ModelConfig, preset
from core.errors import UserError
from core.leaves import model_leaves
from core.model import Params, abstract_params, forward, init_params, logits
from tests.models import GPT, LLAMA

SIZES = {
    "mtlm1-88m": 113_068_800, "mtlm1-200m": 201_560_832, "mtlm2-40m": 40_149_248,
    # As published with the models.
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "qwen3-0.6b": 596_049_920,
}  # fmt: skip


def module_tree(config: ModelConfig) -> Params:
    """What the modules make, as shapes and types."""
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def counted(config: ModelConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(module_tree(config)))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_sizes_of_the_design(name):
    config = preset(name)
    assert counted(config) == config.n_params
    if name in SIZES:
        assert config.n_params == SIZES[name]
    else:  # in the small: with the byte tokenizer 1M, with the large vocabulary 10M at most
        assert 1e6 < dataclasses.replace(config, vocab_size=258).n_params < 2e6 and config.n_params < 1e7


def test_the_first_model_without_its_embeddings():
    config = preset("mtlm1-88m")
    assert config.n_params - config.n_embedding_params == 88_492_800


def draw_config(
    kv_heads: int, shared: int, head_size: int, whole: bool, biased: str, **fields
) -> ModelConfig:
    heads = kv_heads * shared
    width = {"d_model": heads * head_size} if whole else {"d_model": 6, "head_dim": head_size}
    biases = {"biases": biased == "all", "qkv_biases": biased == "qkv"}
    return ModelConfig(n_heads=heads, n_kv_heads=kv_heads, **width, **biases, **fields)


configs = st.builds(
    draw_config,
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 3),
    head_size=st.integers(1, 5).map(lambda n: 2 * n),
    whole=st.booleans(),
    biased=st.sampled_from(["none", "all", "qkv"]),
    qk_norm=st.booleans(),
    vocab_size=st.integers(1, 50),
    context=st.integers(1, 30),
    n_layers=st.integers(1, 4),
    d_mlp=st.integers(1, 40),
    positions=st.sampled_from(["rope", "learned"]),
    mlp=st.sampled_from(get_args(Mlp)),
    tied=st.booleans(),
)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(configs)
def test_the_table_of_leaves_is_the_models_tree(config):
    """In its order, too; parameters are counted from the table."""
    params = module_tree(config)
    assert abstract_params(config) == params
    shapes = {path: leaf.shape for path, leaf in flatten(params)[0].items()}
    assert list(shapes.items()) == [(leaf.path, leaf.shape(config)) for leaf in model_leaves(config)]
    assert counted(config) == config.n_params
    assert all(leaf.shape[0] == config.n_layers for leaf in jax.tree.leaves(params["layers"]))
    outside = {k: v for k, v in params.items() if k not in ("layers", "norm")}
    assert sum(leaf.size for leaf in jax.tree.leaves(outside)) == config.n_embedding_params
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("config", [LLAMA, GPT], ids=["llama", "gpt"])
def test_flops_equal_the_compiled_products(config):
    """XLA's own count of a forward pass of two lengths, from which what attention costs can be told."""

    def forward_flops(length: int) -> float:
        one = dataclasses.replace(config, n_layers=1, context=256)  # XLA counts a loop's body once

        def run(params, tokens):
            return logits(one, params, forward(one, params, tokens))

        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        counted = jax.jit(run).lower(abstract_params(one), tokens).cost_analysis()["flops"]
        return counted / length

    one = dataclasses.replace(config, n_layers=1)
    for length in (64, 256):
        # Forward and backward are three forward passes. XLA counts all scores where we count the causal
        # half, and element-wise work besides: some 5 operations a score of 24 and a little a layer.
        all_scores = 2 * one.n_layers * config.d_model * length
        ours = dataclasses.replace(one, context=length).flops_per_token() / 3 + all_scores
        assert ours < forward_flops(length) < 1.25 * ours


def test_flops_by_hand():
    # mtlm1-88m: weights 12 (4 * 768^2 + 3 * 768 * 2176) + 32,000 * 768 = 113,049,600, times 6;
    # scores and values 2 products * 2 FLOPs * 768 * 512 visible positions on average * 3 * 12 layers.
    whole = preset("mtlm1-88m")
    assert whole.flops_per_token() == 6 * 113_049_600 + 12 * 768 * 512 * 12
    half = dataclasses.replace(whole, context=512)
    assert half.flops_per_token() == 6 * 113_049_600 + 12 * 768 * 256 * 12


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocab_size": 262_145}, "262145"), ({"vocab_size": 0}, "vocab_size"),
        ({"n_layers": 0}, "n_layers"),
        ({"d_model": -4}, "d_model"), ({"d_mlp": 0}, "d_mlp"), ({"context": 0}, "context"),
        ({"n_heads": 5}, "n_heads"), ({"n_heads": 16}, "even"), ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"), ({"dropout": float("nan")}, "dropout"),
        ({"rope_scaling": "linear,factor=2,factor=4"}, "gives factor twice"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be(change, named):
    with pytest.raises(UserError, match=named) as caught:
        dataclasses.replace(LLAMA, **change)
    assert "\n" not in str(caught.value)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown preset 'nope'\. Presets: mtlm1-88m, "):
        preset("nope")
    with pytest.raises(UserError, match="did you mean 'mtlm1-88m'"):
        preset("mtlm1-80m")
