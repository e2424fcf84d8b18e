"""Models and texts of the tests of decoding."""

import dataclasses
from collections.abc import Iterable

import torch

from core.config import ModelConfig
from core.generate import Sampling
from port_torch.model import Decoder
from tests.models import GPT, LLAMA

GREEDY = Sampling(temperature=0)
# Heads of 64, as the kernels take them.
FIT = {"context": 48, "d_model": 64, "n_heads": 1, "d_mlp": 80, "n_layers": 2}
SMALL = {name: dataclasses.replace(base, **FIT) for name, base in (("llama", LLAMA), ("gpt", GPT))}


def random_decoder(config: ModelConfig, dtype: torch.dtype, device: str = "cpu", std: float = 0.2) -> Decoder:
    """A model whose every parameter matters: norms are not all 1, nor biases 0."""
    generator = torch.Generator(device).manual_seed(1)
    with torch.device(device):
        model = Decoder(config)
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.data = 1 + 0.3 * noise if "norm" in name else std * noise
    return model.to(dtype).eval()


def complete(steps: Iterable[list[int | None]]) -> list[list[int]]:
    """All tokens of every row."""
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]
