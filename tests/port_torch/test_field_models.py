"""The field's other small models: transformers' own classes at their shapes with random weights, in and out.

The shapes are those published, but for fewer layers, a smaller vocabulary and a narrower MLP, which hold
nothing that the others do not.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import port_torch.convert
import port_torch.import_checkpoint
from core.checkpoint.checkpointer import restore_params
from core.checkpoint.manifest import load_manifest
from core.config import ModelConfig
from core.generation import Generator
from core.model import Compute, abstract_params
from core.sampling import Sampling
from port_torch.formats.llama import read_params
from port_torch.hf_config import model_config
from port_torch.model import load
from port_torch.model_folder import open_model
from port_torch.sampling import stream
from tests.port_torch.test_model import flax_logits, mirror_logits
from tests.port_torch.trained import transformers_model

SMOLLM2 = {
    "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048,
    "rope_theta": 1e5, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
QWEN2 = {
    "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096, "rope_theta": 1e6, "tie_word_embeddings": True,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": ("Llama", SMOLLM2),
    "smollm2-360m": ("Llama", SMOLLM2 | {
        "hidden_size": 960, "num_attention_heads": 15, "num_key_value_heads": 5,
    }),
    "qwen2.5-0.5b": ("Qwen2", QWEN2),
    "qwen2, scaled": ("Qwen2", QWEN2 | {"rope_scaling": YARN, "max_position_embeddings": 128}),
    "qwen3-0.6b": ("Qwen3", {
        "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 4096, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    }),
    "llama-3.2-1b": ("Llama", {
        "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "rope_theta": 5e5,
        "rope_scaling": LLAMA3, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }),
    "tinyllama-1.1b": ("Llama", {
        "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }),
}  # fmt: skip
SMALL = {"vocab_size": 258, "num_hidden_layers": 2, "intermediate_size": 96}
QUICK = ("smollm2-135m",)
named = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
LIMIT = 2e-5
"""Of the largest logit: float32 sums of up to 1,024 terms in another order, through two layers."""


def make(name: str, folder: Path) -> nn.Module:
    """Transformers' model with weights of which each matters, saved in `folder`."""
    kind, fields = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SMALL | fields, bos_token_id=256, eos_token_id=257)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor_name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.3 * noise if "norm" in tensor_name else 0.06 * noise)
    model.save_pretrained(folder)
    return model


def tokens_of(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (rows, length))


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return np.abs(found - expected).max() <= LIMIT * np.abs(expected).max()


@named
def test_imported_it_computes_the_same_and_exported_it_is_the_stock_class_again(
    name: str, tmp_path: Path, monkeypatch, capsys
):
    theirs = make(name, tmp_path / "theirs")
    tokens = tokens_of(2, 100)
    with torch.inference_mode():
        expected = theirs(torch.tensor(tokens)).logits.numpy()

    # In: the mirror on the folder as it is; Flax on the import.
    assert close(mirror_logits(load(tmp_path / "theirs"), tokens), expected)
    folders = [str(tmp_path / name) for name in ("theirs", "in", "out")]
    monkeypatch.setattr(sys, "argv", ["import_checkpoint", *folders[:2], "--tokenizer", "bytes"])
    assert not port_torch.import_checkpoint.main()
    assert f"theirs ({theirs.config.model_type}): " in capsys.readouterr().out
    model = ModelConfig(**load_manifest(tmp_path / "in").config["model"])
    params = restore_params(tmp_path / "in", abstract_params(model))
    assert close(flax_logits(model, params, tokens), expected)

    # Out: of the class it came from, with the same logits to the bit.
    monkeypatch.setattr(sys, "argv", ["convert", *folders[1:]])
    assert not port_torch.convert.main()
    back = transformers_model(tmp_path / "out")
    assert type(back) is type(theirs)
    with torch.inference_mode():
        np.testing.assert_array_equal(back(torch.tensor(tokens)).logits.numpy(), expected)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert model_config(content) == model


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("smollm2-135m", marks=pytest.mark.slow), "qwen3-0.6b"])
def test_greedy_text_is_the_same_token_by_token(name: str, tmp_path: Path):
    """Prompts of three lengths in one batch, padded on the left by transformers; through caches."""
    theirs = make(name, tmp_path)
    prompts = [row[:n].tolist() for row, n in zip(tokens_of(3, 20), (20, 7, 1), strict=True)]
    padded = torch.tensor([[257] * (20 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (20 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    made = theirs.generate(
        padded, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=257, eos_token_id=[]
    )
    expected = made[:, 20:].tolist()
    greedy = Sampling(temperature=0.0)
    mirror = load(tmp_path)
    assert [list(row) for row in zip(*stream(mirror, prompts, greedy, 64), strict=True)] == expected
    opened = open_model(tmp_path)
    config = dataclasses.replace(opened.config, context=96)  # its cache is of the whole context
    generator = Generator(config, Compute())
    assert generator.complete(read_params(opened), prompts, greedy, 64) == expected
