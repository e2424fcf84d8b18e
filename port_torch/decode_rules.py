"""Which models the decode kernels compute; of any other it is said in one sentence why not.

A kernel that ignored a part of a model would make other text and say nothing. So what they compute is a list
of what is known, of every field of the config and of every kind of module; what is not on it is refused.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from core.config import ModelConfig
from port_torch.model import MLP, Attention, Block, Decoder, RMSNorm

HEAD_SIZES = (32, 64, 128)
# What a decoder is made of, for which `Step.launch` has kernels; adapters are something else.
MODULES = (Decoder, Block, Attention, MLP, RMSNorm, nn.Linear, nn.Embedding, nn.Dropout, nn.ModuleList)


def _multiple_of_8(name: str, config: ModelConfig) -> str | None:
    size = getattr(config, name)
    return f"{name} is {size}, not a multiple of 8" if size % 8 else None


def _one_of(*known: Any) -> Callable[[str, ModelConfig], str | None]:
    def rule(name: str, config: ModelConfig) -> str | None:
        value = getattr(config, name)
        return None if value in known else f"{name} is {value}, not one of {', '.join(map(str, known))}"

    return rule


def _head_size(name: str, config: ModelConfig) -> str | None:
    if config.head_size in HEAD_SIZES:
        return None
    return f"the head size is {config.head_size}, not one of {', '.join(map(str, HEAD_SIZES))}"


def _any(name: str, config: ModelConfig) -> str | None:
    return None


# For every field that says what a model computes: why the kernels do not compute its value, None if they do.
RULES: dict[str, Callable[[str, ModelConfig], str | None]] = {
    "vocab_size": _any,
    "context": _any,
    "d_model": _multiple_of_8,
    "n_layers": _any,
    "n_heads": _head_size,
    "n_kv_heads": _any,
    "head_dim": _any,  # the head size that follows has its rule at n_heads
    "d_mlp": _multiple_of_8,
    "positions": _one_of("rope", "learned"),
    "mlp": _one_of("swiglu", "gelu"),
    "biases": _one_of(False, True),
    "qkv_biases": _one_of(False, True),
    "qk_norm": _one_of(False, True),
    "tied": _one_of(False, True),
    "rope_theta": _any,
    "rope_scaling": _any,  # the angles are given to the kernels
    "norm_eps": _any,
}


def not_computed(config: ModelConfig) -> str | None:
    """Why the decode kernels do not compute what this config says, None if they do.

    A field without a rule is one that they know nothing of: it is refused at every value but its default,
    which models older than the field have.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, value in config.function().items():
        if name in RULES:
            if reason := RULES[name](name, config):
                return reason
        elif value != defaults[name]:
            return f"{name} is {value}, of which they know nothing"
    return None


def why_not(model: Decoder) -> str | None:
    """Why the decode kernels cannot run this model, None if they can."""
    for name, p in model.named_parameters():
        if not p.is_cuda:
            return f"the model is on the device {p.device.type}"
        if p.dtype != torch.bfloat16:
            return f"the weights are {str(p.dtype).removeprefix('torch.')}, not bfloat16 ({name})"
    for name, module in model.named_modules():
        if type(module) not in MODULES:
            return f"{name} is a {type(module).__name__}, of which they know nothing"
    if model.training and model.config.dropout:
        return "the model is being trained, with dropout"
    return not_computed(model.config)
