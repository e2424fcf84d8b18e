"""What is derived from a run's figures: MFU, perplexity, bits per byte."""

import math
from typing import NamedTuple

# Peak dense bfloat16 FLOP/s of one device, by its name in JAX and PyTorch; from the vendors' datasheets.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def model_flops_utilization(
    tokens_per_second: float, flops_per_token: int, device_kind: str, n_devices: int
) -> float | None:
    """MFU: the model's own FLOPs as a fraction of the devices' peak; None where the peak is unknown."""
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * n_devices)


def bits_per_byte(nll_per_token: float, tokens: int, n_bytes: int) -> float:
    """Nats per token to bits per byte of the text: comparable between tokenizers, as perplexity is not.

    Args:
        nll_per_token: mean over the predicted tokens.
        tokens: predicted tokens of the whole text.
        n_bytes: its length in UTF-8.
    """
    return nll_per_token / math.log(2) * tokens / n_bytes


class Score(NamedTuple):
    """The loss of a held-out set."""

    nll: float
    """Nats per predicted token."""
    perplexity: float
    bits_per_byte: float
    """For part of a set: by the whole set's tokens per byte."""
    tokens: int
    """How many predictions were scored."""


def make_score(nll: float, scored: int, tokens: int, n_bytes: int) -> Score:
    """The score of a set of `tokens` predictions and `n_bytes`, of which `scored` have `nll` nats in all."""
    nll /= scored
    perplexity = math.exp(nll) if nll < 700 else math.inf
    return Score(nll, perplexity, bits_per_byte(nll, tokens, n_bytes), scored)
