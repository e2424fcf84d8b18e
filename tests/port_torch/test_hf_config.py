"""config.json: what it may say, and that whatever it says is read or refused in one sentence."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from core.errors import UserError
from port_torch.folder import open_folder, read_json
from port_torch.hf_config import COMPUTED, FIXED, IRRELEVANT, hf_config, model_config
from port_torch.model_folder import open_model
from tests.models import random_params
from tests.port_torch.folders import SMALL, tensors_of, write_folder

LLAMA, GPT = SMALL["llama"], SMALL["gpt"]
GIVEN = {kind: hf_config(config, 256, 257, "float32") for kind, config in SMALL.items()}
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}


def test_every_key_of_transformers_classes_is_known():
    """A release that adds one has to be looked at: does it change what the class computes?"""
    known = COMPUTED | FIXED.keys() | IRRELEVANT
    for kind in (LlamaConfig, Qwen2Config, Qwen3Config, PretrainedConfig):
        assert not kind().to_dict().keys() - known
    assert not (COMPUTED & FIXED.keys()) | (COMPUTED & IRRELEVANT) | (FIXED.keys() & IRRELEVANT)
    assert GIVEN["llama"].keys() <= known and GIVEN["gpt"].keys() <= known | {"auto_map"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"scaled by 'dynamic' \(rope_scaling\)"),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"scaled by 'longrope' \(rope_parameters\)"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor 4 is not below high_freq"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor of rope scaling linear is '2'"),
        ({"rope_scaling": {"type": "linear"}}, "rope scaling linear needs factor=NUMBER"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "finetuned": True}}, "has no 'finetuned'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "asks for layer_types"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window True"),
        ({"model_type": "qwen3", "attention_bias": True}, "biases in one of attention and MLP"),
        ({"model_type": "gemma3_text"}, "'gemma3_text' model, which is not computed here"),
        ({"rope_parameters": {"full_attention": DEFAULT}}, "full_attention .* of rotary positions"),
        ({"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": DEFAULT, "rope_theta": 5e5}, "rope_theta 10000.0 and rope_theta 500000.0"),
        ({"rope_parameters": [1]}, r"rope_parameters \[1\], which is not an object"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"asks for quantization_config \{'quant_method'"),
        ({"sliding_window": 128}, "asks for sliding_window 128"),
        ({"partial_rotary_factor": 0.5}, "asks for partial_rotary_factor 0.5"),
        ({"is_causal": False}, "asks for is_causal False"),
        ({"auto_map": {"AutoModelForCausalLM": "other.Model"}}, "code of its own"),
        ({"hidden_size": "3"}, "hidden_size '3', which is not a whole number from 1"),
        ({"hidden_size": 96.0}, "hidden_size 96.0, which is not a whole number"),
        ({"hidden_size": True}, "hidden_size True, which is not a whole number"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"rms_norm_eps": None}, "has no rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan, which is not a positive number"),
        ({"rope_theta": 10**400}, "which is not a positive number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false', which is not true or false"),
        ({"attention_bias": 0}, "attention_bias 0, which is not true or false"),
        ({"num_attention_heads": 0}, "num_attention_heads 0, which is not a whole number from 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0, which is not a whole number from 1"),
        ({"num_hidden_layers": 10**30}, "which is not a whole number from 1 to"),
        ({"hidden_act": ["silu"]}, "which is not a word"),
    ],
)  # fmt: skip
def test_what_is_refused(change: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        model_config(GIVEN["llama"] | change)


@pytest.mark.parametrize("name", ["positions", "hidden_act", "attention_bias", "rms_norm_eps"])
def test_our_own_config_has_every_key(name: str):
    """Its class has other defaults than a Llama's."""
    content = {key: value for key, value in GIVEN["gpt"].items() if key != name}
    with pytest.raises(UserError, match=f"config.json has no {name}"):
        model_config(content)
    with pytest.raises(UserError, match="asks for 'sinus' positions"):
        model_config(GIVEN["gpt"] | {"positions": "sinus"})


def test_transformers_takes_rope_scaling_before_rope_parameters():
    both = {"rope_parameters": DEFAULT, "rope_scaling": LLAMA3}
    for content in (both, {"rope_parameters": LLAMA3, "rope_scaling": None}):
        config = model_config(GIVEN["llama"] | content)
        theirs = LlamaConfig(**GIVEN["llama"] | content).rope_parameters
        assert theirs["rope_type"] == config.rope.kind == "llama3"
        assert config.rope["factor"] == theirs["factor"] and config.rope_theta == theirs["rope_theta"]


def test_what_is_written_is_read_again():
    """Of every class, and of what only ours computes."""
    rope = ("linear,factor=2", "yarn,factor=4,original_context=24,truncate=0,attention_factor=1.25")
    changes = (
        {}, {"n_kv_heads": 2}, {"head_dim": 16}, {"qkv_biases": True}, {"qk_norm": True}, {"biases": True},
        {"qk_norm": True, "qkv_biases": True}, {"qk_norm": True, "biases": True, "n_kv_heads": 1},
        *({"rope_scaling": text} for text in rope), {"mlp": "gelu", "rope_scaling": rope[1]},
    )  # fmt: skip
    for change in changes:
        config = dataclasses.replace(LLAMA, **change)
        assert model_config(hf_config(config, 256, 257, "float32")) == config, change


def test_both_releases_of_transformers_find_theta():
    written = hf_config(dataclasses.replace(LLAMA, rope_theta=5e5), 256, 257, "float32")
    assert (written["rope_theta"], written["rope_parameters"]) == (5e5, DEFAULT | {"rope_theta": 5e5})
    assert "rope_parameters" not in GIVEN["gpt"]  # whose positions are learned


def test_our_older_exports_have_no_key_for_what_came_later():
    older = {name: value for name, value in GIVEN["gpt"].items() if name not in ("qkv_bias", "qk_norm")}
    assert model_config(older) == model_config(GIVEN["gpt"])


def test_a_window_that_qwen_does_not_use_is_none():
    """As the folders of Qwen2.5 have it."""
    config = dataclasses.replace(LLAMA, qkv_biases=True)
    unused = {"sliding_window": 32768, "use_sliding_window": False}
    assert model_config(hf_config(config, 256, 257, "float32") | unused) == config
    with pytest.raises(UserError, match="asks for sliding_window 32768"):
        model_config(GIVEN["llama"] | unused)


def test_a_llama_may_leave_out_what_has_a_default(capsys):
    sizes = ("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads")  # fmt: skip
    content = {name: GIVEN["llama"][name] for name in ("model_type", *sizes)}
    theirs = LlamaConfig(**content)
    config = model_config(content)
    assert (
        config.rope_theta == theirs.rope_parameters["rope_theta"] and config.norm_eps == theirs.rms_norm_eps
    )
    assert config.tied == theirs.tie_word_embeddings and config.biases == theirs.attention_bias
    assert model_config(content | {"num_key_value_heads": None, "head_dim": None}) == config
    assert not capsys.readouterr().err
    model_config(content | {"of_a_later_release": 1})
    assert "unknown keys, which are ignored: 'of_a_later_release'" in capsys.readouterr().err


# --- drawn ---

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.sampled_from([0, -1, 2, 2**31, 2**63, 10**7, 10**30, 96.0, "3", "false", "sinus", "default", 1e-320]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["rope_type", "type", "rope_theta", "factor", "x"]), inner, max_size=3
    ),
    max_leaves=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("drawn")
    return {
        kind: write_folder(root / kind, config, tensors_of(config, random_params(config)))
        for kind, config in SMALL.items()
    }


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(["llama", "gpt"]),
    changes=st.dictionaries(
        st.sampled_from(sorted(COMPUTED | FIXED.keys() - {"model_type"})), VALUES, min_size=1, max_size=2
    ),
    left_out=st.sets(st.sampled_from(sorted(COMPUTED)), max_size=1),
)
def test_whatever_config_json_says_is_read_or_refused(folders, kind: str, changes: dict, left_out: set):
    """Never another exception than a UserError of one line, and never slow; what is read fits the tensors."""
    content = {name: value for name, value in GIVEN[kind].items() if name not in left_out} | changes
    (folders[kind] / "config.json").write_text(json.dumps(content))
    started = time.process_time()
    try:
        config = model_config(read_json(folders[kind], "config.json"))
        if config.function() != SMALL[kind].function():  # the same again need not be opened each time
            assert open_model(folders[kind]).config.n_layers == SMALL[kind].n_layers
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 600, error
    # Tables for 10^7 layers would take hours, ordinary ones take 0.1 s.
    assert time.process_time() - started < 20


@pytest.mark.parametrize("content", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000])
def test_deep_nesting_is_not_json(folders, content: str):
    (folders["llama"] / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        open_folder(folders["llama"])


def test_more_layers_than_tensors_are_refused_at_once(folders):
    (folders["llama"] / "config.json").write_text(json.dumps(GIVEN["llama"] | {"num_hidden_layers": 10**7}))
    with pytest.raises(UserError, match=r"says 10,000,000 layers, and the folder holds 29 tensors"):
        open_model(folders["llama"])
