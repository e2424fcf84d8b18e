"""Transformers' own class of a model's shape: what the benchmarks compare with."""

from torch import nn

from core.config import ModelConfig
from port_torch.hf_config import STOCK, hf_config, stock_type


def stock_model(config: ModelConfig, use_cache: bool) -> nn.Module:
    """With random weights, float32, on the CPU; `use_cache` for generation.

    The config must have a class there (`stock_type`).
    """
    import transformers

    architecture = getattr(transformers, STOCK[stock_type(config)])
    content = hf_config(config, 1, 2, "float32") | {"use_cache": use_cache}
    settings = architecture.config_class.from_dict(content)
    settings._attn_implementation = "sdpa"
    return architecture(settings)
