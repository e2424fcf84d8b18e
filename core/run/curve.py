"""The picture of a run: its loss over the tokens read."""

from pathlib import Path

from core.run.log import CARRIED, read_log


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
