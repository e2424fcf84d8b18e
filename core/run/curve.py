"""The picture of a run: training and held-out loss over the tokens read, on one scale."""

from pathlib import Path
from typing import Any

import numpy as np

from core.data.mixture import phases_of
from core.folders import write_picture
from core.run.folder import read_config
from core.run.log import CARRIED, read_log

TRAIN, SMOOTHED, GREY = "#a9c7de", "#0072b2", "#5f6368"
SPLITS = (("#d55e00", "o"), ("#009e73", "s"), ("#cc79a7", "^"), ("#e69f00", "D"), ("#56b4e9", "v"))
"""Colour and marker of each held-out split; the colours are Okabe and Ito's, safe for the colour-blind."""


def plot_curve(folder: Path) -> Path:
    """Draws loss_curve.png of a run folder: training and held-out loss, nats per token, over tokens."""
    from matplotlib.figure import Figure

    train = [row for row in read_log(folder, "train") if not isinstance(row["nll"], str)]
    evals = [row for row in read_log(folder, "eval") if not isinstance(row["nll"], str)]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    tokens, losses = ([row[name] for row in train] for name in ("tokens", "nll"))
    millions = np.array(tokens) / 1e6
    axes.plot(millions, losses, color=TRAIN, linewidth=0.8, label="training, each step")
    axes.plot(millions, _smooth(losses), color=SMOOTHED, linewidth=1.6, label="training, smoothed")
    for growth in sorted({row[CARRIED] for row in train if CARRIED in row}):
        after = [row["tokens"] / 1e6 for row in train if row["step"] >= growth]
        if after:
            axes.axvline(after[0], color=GREY, linestyle=":", linewidth=1.2, label=f"grown at step {growth}")
    if record := read_config(folder):
        for phase in phases_of(record["data"])[1:]:
            at = phase.first * record["model"]["context"] / 1e6
            axes.axvline(at, color=GREY, linestyle="--", linewidth=1.2, label=f"from here {phase}")
    splits = sorted({row["split"] for row in evals})
    for i, name in enumerate(splits):
        rows = [row for row in evals if row["split"] == name]
        color, marker = SPLITS[i % len(SPLITS)]
        x, y = [row["tokens"] / 1e6 for row in rows], [row["nll"] for row in rows]
        label = f"held-out {name}: {_last(rows)}"
        axes.plot(x, y, marker=marker, color=color, markersize=4.5, linewidth=1.2, label=label)
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right", edgecolor="none", framealpha=0.9)
    axes.set_title(f"{folder.name}{_summary(evals)}")
    path = folder / "loss_curve.png"
    write_picture(figure, path, dpi=130)
    return path


def plot_branch(run: Path, branch: Path, first: int) -> Path:
    """Draws branch.png in a branch's folder: the training losses of the run and of the branch from update
    `first` on, and their difference below."""
    from matplotlib.figure import Figure

    end = max((row["step"] for row in read_log(branch, "train")), default=first)
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    values = []
    for folder, color, line in ((run, GREY, "--"), (branch, SMOOTHED, "-")):
        rows = [row for row in read_log(folder, "train") if first <= row["step"] <= end]
        values.append({row["step"]: float(row["nll"]) for row in rows})
        label = f"{'run' if folder is run else 'branch'} ({folder.name})"
        upper.plot(list(values[-1]), list(values[-1].values()), line, color=color, linewidth=1.4, label=label)
    both = sorted(values[0].keys() & values[1].keys())
    lower.plot(both, [values[1][step] - values[0][step] for step in both], color=SMOOTHED, linewidth=1.2)
    lower.axhline(0, color=GREY, linewidth=0.8)
    upper.set_ylabel("training loss (nats per token)")
    lower.set_ylabel("branch minus run")
    lower.set_xlabel("update")
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
    upper.legend(loc="upper right", edgecolor="none", framealpha=0.9)
    upper.set_title(f"{branch.name}: a branch of {run.name} from update {first} on")
    path = branch / "branch.png"
    write_picture(figure, path, dpi=130)
    return path


def _summary(evals: list[dict[str, Any]]) -> str:
    """From where to where the loss of the first held-out split went, for the title."""
    if not evals:
        return ""
    names = sorted({row["split"] for row in evals})
    losses = [row["nll"] for row in evals if row["split"] == names[0]]
    where = f" on {names[0]}" if len(names) > 1 else ""
    return f": held-out loss{where} from {losses[0]:.2f} to {losses[-1]:.2f} nats per token"


def _last(evals: list[dict[str, Any]]) -> str:
    """The last score of a split, in nats per token and in bits per byte, which compare between tokenizers."""
    nll, bits = evals[-1]["nll"], evals[-1]["bits_per_byte"]
    return f"{nll:.3f}" + ("" if isinstance(bits, str) else f" ({bits:.3f} bits per byte)")


def _smooth(values: list[float]) -> np.ndarray:
    """The mean over the 4% of all steps around each; over fewer near the ends, so that it never lags."""
    n = len(values)
    at = np.arange(n)
    reach = np.minimum(np.minimum(at, n - 1 - at), n // 50)
    sums = np.cumsum([0.0, *values])
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)
