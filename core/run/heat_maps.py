"""The picture of a run's watched updates: heat maps over updates and layers."""

from pathlib import Path
from typing import Any

import numpy as np

from core.folders import write_picture
from core.run.watching import Watched

COLORS, BAD = "viridis", "#d62728"
WIDTH, HEIGHT = 12.0, 9.0  # inches


def plot_heat_maps(watched: Watched, title: str, path: Path, grown_at: int | None = None) -> None:
    """Draws a panel for every measure into `path`. grown_at: the update at which the model grew."""
    import matplotlib
    from matplotlib.figure import Figure

    rows, layers = watched.of_rows, watched.of_layers
    with np.errstate(divide="ignore", invalid="ignore"):
        peak = rows["largest"] / rows["rms"]
    uniform = watched.uniform[:, None]
    logarithmic = (
        ("norm of the weights", rows["weight"]),
        ("norm of the gradient", rows["gradient"]),
        ("norm of the update over that of the weights", watched.update_over_weight),
        ("rms of the residual stream", rows["rms"]),
        ("largest value of the residual stream over its rms", peak),
        ("rms of what a layer adds, over the stream's", watched.share_added),
    )
    shares = (
        ("attention entropy, 1: uniform", layers["entropy"] / uniform),
        ("attention entropy of the head with the lowest", layers["lowest_entropy"] / uniform),
    )
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots(4, 2, sharex=True)
    panels = iter(axes.T.flat)
    for name, values in logarithmic:
        usable = values[np.isfinite(values) & (values > 0)]
        low, high = (usable.min(), usable.max()) if usable.size else (0.1, 1.0)
        norm = matplotlib.colors.LogNorm(low, max(high, 1.01 * low))
        _panel(next(panels), watched, name, np.where(values == 0, low, values), norm, grown_at)
    for name, values in shares:
        _panel(next(panels), watched, name, values, matplotlib.colors.Normalize(0, 1), grown_at)
    for ax in axes[-1]:
        ax.set_xlabel("update")
    figure.suptitle(title)
    write_picture(figure, path, dpi=90)


def _panel(
    axes: Any, watched: Watched, name: str, values: np.ndarray, norm: Any, grown_at: int | None
) -> None:
    import matplotlib

    colors = matplotlib.colormaps[COLORS].with_extremes(bad=BAD)
    names = watched.names if values.shape[1] == len(watched.names) else watched.names[1:-1]
    shown = np.ma.masked_invalid(values.T)
    edges = _edges(watched.steps)
    image = axes.pcolormesh(edges, np.arange(len(names) + 1), shown, cmap=colors, norm=norm)
    every = -(-len(names) // 8)
    ticks = np.arange(0, len(names), every)
    axes.set_yticks(ticks + 0.5, [names[i].removeprefix("layers/") for i in ticks])
    axes.set_title(name, fontsize=10)
    axes.set_facecolor(BAD)
    if grown_at is not None and edges[0] < grown_at < edges[-1]:
        axes.axvline(grown_at, color="white", linestyle=":")
    axes.figure.colorbar(image, ax=axes, pad=0.01)


def _edges(steps: np.ndarray) -> np.ndarray:
    """[T + 1]: between which a watched update is drawn: up to the next."""
    width = int(np.median(np.diff(steps))) if len(steps) > 1 else 1
    return np.append(steps, steps[-1] + width)
