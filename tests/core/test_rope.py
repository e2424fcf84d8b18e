"""Scaled rotary positions: their frequencies against those of transformers, and what is refused."""

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from core.errors import UserError
from core.rope import make_scaling, parse_scaling
from port_torch.hf_config import written_scaling

THETA, HEAD = 10_000.0, 64


@pytest.mark.parametrize(
    "text",
    [
        "linear,factor=2",
        "llama3,factor=8,low_freq_factor=1,high_freq_factor=4,original_context=512",
        "yarn,factor=4,original_context=512",
        "yarn,factor=4,original_context=16,beta_slow=3",  # the ramp begins before the head does
        "yarn,factor=4,original_context=512,attention_factor=1.25,truncate=0",
    ],
)
def test_frequencies_are_those_of_transformers(text: str):
    scaling = parse_scaling(text)
    config = LlamaConfig(
        hidden_size=2 * HEAD, num_attention_heads=2, head_dim=HEAD, max_position_embeddings=2048,
        rope_parameters=written_scaling(scaling) | {"rope_theta": THETA},
    )  # fmt: skip
    theirs, amplitude = ROPE_INIT_FUNCTIONS[scaling.kind](config, "cpu")
    ours = scaling.multipliers(HEAD, THETA) * THETA ** (-np.arange(0, HEAD, 2) / HEAD)
    # Theirs are computed in float32, a power and a few products: 1e-5 is 80 roundings.
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)
    assert scaling.amplitude == pytest.approx(amplitude, rel=1e-12)


def test_what_is_written_leaves_out_defaults():
    assert str(parse_scaling("yarn,beta_fast=32,factor=4,original_context=512")) == (
        "yarn,factor=4,original_context=512"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"factor": 2, "beta_fast": 32}, "rope scaling linear has no 'beta_fast': it has factor"),
        ({"factor": 2e9}, r"factor of rope scaling linear is 2000000000.0, not a number up to 1e9"),
        ({"factor": "2"}, "factor of rope scaling linear is '2', not a number"),
        ({"factor": -1}, "factor of rope scaling linear is -1, not a number"),
    ],
)
def test_values_that_make_no_sense(given: dict, message: str):
    with pytest.raises(UserError, match=message):
        make_scaling("linear", given)
