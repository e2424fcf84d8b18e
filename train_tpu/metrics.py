"""What is derived from a run's figures: MFU, bits per byte, the loss curve."""

import math
from pathlib import Path
from typing import NamedTuple

from core.run.log import CARRIED, read_log

# Peak dense bfloat16 FLOP/s of one device, by what JAX calls it, and PyTorch, too; from the vendors'
# datasheets.
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
    """The part of the devices' peak that the model's own FLOPs take (MFU); None where the peak is unknown."""
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * n_devices)


def bits_per_byte(nll_per_token: float, tokens: int, n_bytes: int) -> float:
    """Nats a token to bits a byte of the text: comparable between tokenizers, as perplexity is not.

    Args:
        nll_per_token: mean over the predicted tokens.
        tokens: predicted tokens of the whole text.
        n_bytes: its length in UTF-8.
    """
    return nll_per_token / math.log(2) * tokens / n_bytes


class Score(NamedTuple):
    """The loss of a held-out set."""

    nll: float
    """Nats a predicted token."""
    perplexity: float
    bits_per_byte: float
    """For part of a set: by the whole set's tokens a byte."""
    tokens: int
    """How many predictions were scored."""


def make_score(nll: float, scored: int, tokens: int, n_bytes: int) -> Score:
    """The score of a set of `tokens` predictions and `n_bytes`, of which `scored` have `nll` nats in all."""
    nll /= scored
    perplexity = math.exp(nll) if nll < 700 else math.inf
    return Score(nll, perplexity, bits_per_byte(nll, tokens, n_bytes), scored)


def plot_curve(folder: Path) -> Path:
    """Draws loss_curve.png of a run folder: training loss and held-out bits per byte over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train = [row for row in read_log(folder, "train") if not isinstance(row["nll"], str)]
    evals = [row for row in read_log(folder, "eval") if not isinstance(row["bits_per_byte"], str)]
    tokens = [row["tokens"] / 1e6 for row in train]
    figure, left = plt.subplots(figsize=(8, 4.5), layout="constrained")
    losses = [row["nll"] for row in train]
    left.plot(tokens, losses, color="#9db8d9", linewidth=0.8, label="training loss")
    left.plot(tokens, _smooth(losses), color="#1f4e8c", linewidth=1.6, label="training loss, smoothed")
    for growth in sorted({row[CARRIED] for row in train if CARRIED in row}):
        after = [row["tokens"] / 1e6 for row in train if row["step"] >= growth]
        if after:
            left.axvline(after[0], color="#6b7280", linestyle=":", linewidth=1.2)
            left.annotate(
                " grown", (after[0], 0.98), xycoords=("data", "axes fraction"), va="top", color="#6b7280"
            )
    left.set_xlabel("tokens (millions)")
    left.set_ylabel("nats per token")
    left.grid(alpha=0.25)
    right = left.twinx()
    right.set_ylabel("bits per byte, held out")
    names = sorted({row["split"] for row in evals})
    for name, color in zip(names, ("#c2410c", "#15803d", "#7e22ce", "#a16207") * len(names), strict=False):
        rows = [row for row in evals if row["split"] == name]
        x, y = [row["tokens"] / 1e6 for row in rows], [row["bits_per_byte"] for row in rows]
        right.plot(x, y, "o-", color=color, markersize=4, linewidth=1.2, label=f"{name}: {y[-1]:.3f}")
    handles, labels = (a + b for a, b in zip(left.get_legend_handles_labels(),
                                             right.get_legend_handles_labels(), strict=True))  # fmt: skip
    left.legend(handles, labels, loc="upper right", frameon=False)
    left.set_title(folder.name)
    path = folder / "loss_curve.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start."""
    smoothed, mean, total = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        smoothed.append(mean / total)
    return smoothed
