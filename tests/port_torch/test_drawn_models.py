"""Models drawn from what a config may say: exported, then computed by the mirror and by transformers."""

import tempfile
from pathlib import Path
from typing import get_args

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from core.config import Mlp, ModelConfig
from core.errors import UserError
from port_torch.hf_config import model_config
from port_torch.model import load
from port_torch.model_folder import open_model
from tests.models import flat, random_params, random_tokens
from tests.port_torch.folders import tensors_of, write_folder
from tests.port_torch.small_training import theirs_of
from tests.reference import logits64


@st.composite
def models(draw) -> ModelConfig:
    """Any mixture of parts, with sizes that no power of two divides among them."""
    kv_heads, positions = draw(st.integers(1, 5)), draw(st.sampled_from(["rope", "learned"]))
    heads = kv_heads * draw(st.sampled_from([1, 1, 2, 3]))
    head_dim = draw(st.integers(1, 12)) * (2 if positions == "rope" else 1)
    biased = draw(st.sampled_from(["none", "all", "qkv"]))
    return ModelConfig(
        vocab_size=draw(st.integers(2, 99)),
        context=draw(st.integers(1, 40)),
        # transformers' Llama asks for a width that the heads divide.
        d_model=heads * draw(st.sampled_from([head_dim, head_dim, 2])),
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        n_layers=draw(st.integers(1, 3)),
        n_heads=heads,
        d_mlp=draw(st.integers(1, 70)),
        positions=positions,
        mlp=draw(st.sampled_from(get_args(Mlp))),
        biases=biased == "all",
        qkv_biases=biased == "qkv",
        qk_norm=draw(st.booleans()),
        tied=draw(st.booleans()),
        rope_theta=draw(st.sampled_from([2.0, 1e3, 1e4, 123_456.7, 1e6])),
        norm_eps=draw(st.sampled_from([1e-8, 1e-6, 1e-5, 1e-2])),
    )


def check(config: ModelConfig) -> None:
    """What the folder says is the model, and both compute what the formulas do in float64."""
    params = random_params(config)
    tokens = np.asarray(random_tokens(config, 2, min(config.context, 12)))
    leaves = {path: torch.tensor(leaf, dtype=torch.float64) for path, leaf in flat(params).items()}
    expected = logits64(config, leaves, tokens).numpy()
    with tempfile.TemporaryDirectory() as root:
        folder = write_folder(Path(root) / "folder", config, tensors_of(config, params))
        assert open_model(folder).config == config
        mirror, ids = load(folder), torch.tensor(tokens).long()
        theirs = theirs_of(folder, config)
        with torch.inference_mode():
            ours = {"mirror": mirror.logits(mirror(ids)), "transformers": theirs(ids).logits}
    for name, got in ours.items():
        # As in test_import.py: float32 sums, 2e-6 of the largest logit, ten times that allowed.
        assert np.abs(got.numpy() - expected).max() <= 2e-5 * np.abs(expected).max(), (name, config)


SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=3, **SETTINGS)
@given(models())
def test_drawn_models(config: ModelConfig):
    check(config)


@pytest.mark.slow
@settings(max_examples=150, **SETTINGS)
@given(models())
def test_many_drawn_models(config: ModelConfig):
    check(config)


@settings(max_examples=20, **SETTINGS)
@given(
    heads=st.sampled_from([4, 5, 10]), kv_heads=st.sampled_from([1, 5, 10]),
    head_dim=st.sampled_from([12, 24, 30]),
    attention_bias=st.booleans(), mlp_bias=st.booleans(),
)  # fmt: skip
def test_drawn_llamas_are_one_of_ours_or_refused(heads, kv_heads, head_dim, attention_bias, mlp_bias):
    """A Llama that transformers takes has the tensors that we read, or parts that are refused by name."""
    from transformers import LlamaConfig

    content = LlamaConfig(
        vocab_size=20, hidden_size=24 * 5, intermediate_size=8, num_hidden_layers=1, head_dim=head_dim,
        num_attention_heads=heads, num_key_value_heads=kv_heads, attention_bias=attention_bias,
        mlp_bias=mlp_bias,
    ).to_dict()  # fmt: skip
    ours = heads % kv_heads == 0 and attention_bias == mlp_bias
    if ours:
        assert model_config(content).biases == attention_bias
    else:
        with pytest.raises(UserError):
            model_config(content)
