"""The picture of a study: loss over training FLOPs, and the difference to scratch."""

import statistics
from pathlib import Path

import numpy as np

from stacking.study.results import Arm

# Okabe and Ito's colours, which colour-blind readers can tell apart; one an operator.
COLORS = {
    "scratch": "#000000", "stack": "#0072B2", "interleave": "#D55E00", "identity": "#009E73",
    "random": "#CC79A7", "overlap": "#E69F00", "middle": "#56B4E9",
}  # fmt: skip
LINES = ("-", "--", ":", "-.")  # by growth step


def plot(arms: list[Arm], steps: int, heldout: str, path: Path) -> None:
    """Loss over FLOPs, undecayed and decayed, and the undecayed difference to scratch at equal FLOPs.

    Args:
        steps: of scratch's whole run, whose FLOPs are the unit.
        heldout: the held-out set that losses are of.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplot_mosaic(
        [["trunks", "decayed"], ["difference", "difference"]], figsize=(13, 8), layout="constrained"
    )
    scratch = {arm.seed: arm for arm in arms if arm.op == "scratch"}
    unit = next(iter(scratch.values())).at(steps).flops
    growth_steps = sorted({arm.grown_at for arm in arms if arm.grown_at})
    lines = []
    for name in dict.fromkeys(arm.name for arm in arms):
        group = [arm for arm in arms if arm.name == name]
        op, grown_at = group[0].op, group[0].grown_at
        line = LINES[growth_steps.index(grown_at) % len(LINES)] if grown_at else "-"
        style = {"color": COLORS[op], "linestyle": line, "linewidth": 1.4}
        flops, losses = _mean_curve(group, heldout)
        shown = flops >= 0.1 * flops[-1]
        axes["trunks"].plot(flops[shown] / unit, losses[shown], **style)
        ends = [[(point.flops / unit, point.losses[heldout]) for point in arm.decayed] for arm in group]
        whole = [points for points in ends if len(points) == max(map(len, ends))]
        few = f" ({len(whole)} of {len(scratch)} seeds finished)" if len(whole) < len(scratch) else ""
        lines += axes["decayed"].plot(*np.mean(whole, axis=0).T, **style, label=name + few)
        for points in ends:
            axes["decayed"].plot(*np.transpose(points), "o", color=style["color"], markersize=3.5, alpha=0.7)
        for arm in group if grown_at else ():
            x, y = _difference(arm, scratch[arm.seed], heldout)
            axes["difference"].plot(x / unit, y, **style)
    goal = statistics.fmean(arm.at(steps).losses[heldout] for arm in scratch.values())
    axes["decayed"].axhline(goal, color="#6b7280", linewidth=0.8, linestyle=":")
    axes["difference"].axhline(0, color=COLORS["scratch"], linewidth=1.4)
    seeds = f"{len(scratch)} seed{'s' * (len(scratch) != 1)}"
    titles = {
        "trunks": f"undecayed loss, mean of {seeds}",
        "decayed": "decayed loss: a dot per seed, lines through their means;\n"
        "the dotted line is scratch at its full length",
        "difference": "undecayed loss minus scratch's at equal FLOPs, a line per seed: "
        "below 0, the grown model is ahead",
    }
    for name, title in titles.items():
        axes[name].set_title(title, fontsize=10)
        axes[name].set(xlabel="training FLOPs, base included (scratch = 1)", ylabel="nats per token")
        axes[name].grid(alpha=0.25)
    figure.suptitle(f"Growing compared with training from scratch: {heldout}, {seeds}")
    figure.legend(handles=lines, loc="outside right center", frameon=False, title="arm (operator at step)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _difference(arm: Arm, scratch: Arm, heldout: str) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs, and how far the arm's trunk lies above scratch's there, from twice the FLOPs of its growth on
    (the jump at the growth itself would hide the rest)."""
    flops, losses = _curve(arm, heldout)
    grown = next(point.flops for point in arm.trunk if point.steps >= arm.grown_at)
    their_flops, theirs = _curve(scratch, heldout)
    shown = (flops >= 2 * grown) & (flops <= their_flops[-1])
    # The first point is the untrained model at 0 FLOPs, which has no logarithm.
    expected = np.interp(np.log(flops[shown]), np.log(their_flops[1:]), theirs[1:])
    return flops[shown], losses[shown] - expected


def _curve(arm: Arm, heldout: str) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([point.flops for point in arm.trunk], float),
        np.array([point.losses[heldout] for point in arm.trunk], float),
    )


def _mean_curve(group: list[Arm], heldout: str) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the seeds at the evaluations that all of them have."""
    curves = [_curve(arm, heldout) for arm in group]
    n = min(len(flops) for flops, _ in curves)
    return curves[0][0][:n], np.mean([losses[:n] for _, losses in curves], axis=0)
