"""What a study of growth comes to: the table, and loss over FLOPs with the difference to scratch."""

import dataclasses
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np

COLORS = {
    "stack": "#1f4e8c", "interleave": "#c2410c", "identity": "#15803d", "random": "#7e22ce",
    "overlap": "#a16207", "middle": "#0e7490",
}  # fmt: skip
LINES = ("-", "--", ":", "-.")  # by growth step


class Point(NamedTuple):
    """A held-out loss somewhere in an arm."""

    steps: int
    tokens: int
    flops: float
    """Of all training until there, the base's included."""
    losses: dict[str, float]
    """Nats a token, by held-out set."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm's losses: along its trunk, and at the ends of its decayed runs."""

    op: str
    grown_at: int
    seed: int
    lr: float
    trunk: tuple[Point, ...]
    decayed: tuple[Point, ...]
    halted: bool = False
    """The guard ended it before its decayed run at equal tokens was done: it has no losses."""

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return self.op if self.op == "scratch" else f"{self.op} at {self.grown_at}"


def flops_to_reach(points: list[tuple[float, float]], loss: float) -> tuple[float, str]:
    """The FLOPs at which a decayed loss is reached, read off between decayed runs.

    Args:
        points: (FLOPs, loss) of an arm's decayed runs.
        loss: the one to reach.

    Returns:
        FLOPs and "=", interpolated linearly in log FLOPs; or the first run's and "<" if that is better
        already; or the last one's and ">" if none is as good. Nothing is extrapolated.
    """
    points = sorted(points)
    if points[0][1] <= loss:
        return points[0][0], "<"
    for (f0, l0), (f1, l1) in itertools.pairwise(points):
        if l1 <= loss < l0:
            part = (l0 - loss) / (l0 - l1)
            return math.exp(math.log(f0) + part * (math.log(f1) - math.log(f0))), "="
    return points[-1][0], ">"


def write_report(folder: Path, heldout: str | None) -> str:
    """Writes table.md and study.png of the study.json in `folder`; returns the table."""
    record = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    arms = []
    for fields in record["arms"]:
        for kind in ("trunk", "decayed"):
            fields[kind] = tuple(Point(*point) for point in fields[kind])
        arms.append(Arm(**fields))
    name = heldout or next(iter(arms[0].decayed[0].losses))
    table = make_table(arms, record["run"]["steps"], name)
    for fields in record.get("halted", []):
        arm = Arm(**fields)
        table += f"\nHalted by the guard: {arm.name}, seed {arm.seed}, peak lr {arm.lr:g}."
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    plot(arms, record["run"]["steps"], name, folder / "study.png")
    return f"{table}\n\ntable: {folder / 'table.md'}; plot: {folder / 'study.png'}; all losses: study.json"


def make_table(arms: list[Arm], steps: int, heldout: str) -> str:
    """One row an arm: losses and differences to the scratch of the same seed, mean over the seeds and how far
    the seeds lie from it."""
    scratch = {arm.seed: _at(arm, steps) for arm in arms if arm.op == "scratch"}
    rows = [
        "| arm | peak lr | loss, equal tokens | - scratch | FLOPs there | loss, equal FLOPs | - scratch | "
        "FLOPs to scratch's loss |\n|---|---|---|---|---|---|---|---|"
    ]
    for name in dict.fromkeys(arm.name for arm in arms):
        group = [arm for arm in arms if arm.name == name]
        equal_tokens = {arm.seed: _at(arm, steps) for arm in group}
        equal_flops = {arm.seed: arm.decayed[-1] for arm in group if arm.decayed[-1].steps > steps}
        part = equal_tokens[group[0].seed].flops / scratch[group[0].seed].flops
        cells = [name, f"{group[0].lr:g}", *_losses(equal_tokens, scratch, heldout), f"{part:.3f}"]
        if name == "scratch":
            cells[3] = ""
            rows.append("| " + " | ".join([*cells, *[""] * 3]) + " |")
            continue
        cells += _losses(equal_flops, scratch, heldout)
        saved = []
        for arm in (arm for arm in group if arm.seed in equal_flops):
            goal = scratch[arm.seed]
            decayed = [(point.flops, point.losses[heldout]) for point in arm.decayed]
            flops, mark = flops_to_reach(decayed, goal.losses[heldout])
            saved.append((100 * (flops / goal.flops - 1), mark))
        rows.append("| " + " | ".join([*cells, _saved(saved) + _few(len(saved), len(scratch))]) + " |")
    rows.append(
        f"\nHeld-out set {heldout}, nats a token; mean over {len(scratch)} seeds where nothing else is said, "
        "behind ± the largest distance of a seed from it. Differences are to scratch of the same seed, "
        "decayed at its full length. FLOPs count the base."
    )
    return "\n".join(rows)


def _losses(points: dict[int, Point], scratch: dict[int, Point], heldout: str) -> list[str]:
    """Cells of the loss and of its difference to scratch, seed by seed."""
    if not points:
        return ["", ""]
    losses = {seed: point.losses[heldout] for seed, point in points.items()}
    differences = [loss - scratch[seed].losses[heldout] for seed, loss in losses.items()]
    few = _few(len(points), len(scratch))
    return [_spread(list(losses.values()), "{:.4f}") + few, _spread(differences, "{:+.4f}") + few]


def _few(n: int, of: int) -> str:
    """Says so where a study that is not finished has fewer seeds for a cell."""
    return f" ({n} of {of} seeds)" if 0 < n < of else ""


def _saved(saved: list[tuple[float, str]]) -> str:
    """FLOPs to scratch's loss in percent; where one lies outside its decayed runs, each seed's bound."""
    if not saved:
        return ""
    if all(mark == "=" for _, mark in saved):
        return _spread([value for value, _ in saved], "{:+.1f}") + " %"
    bounds = [f"{mark} {value:+.1f} %" if mark != "=" else f"{value:+.1f} %" for value, mark in saved]
    return ", ".join(bounds)


def _at(arm: Arm, steps: int) -> Point:
    return next(point for point in arm.decayed if point.steps == steps)


def _spread(values: list[float], form: str) -> str:
    mean = statistics.fmean(values)
    if len(values) == 1:
        return form.format(mean)
    return f"{form.format(mean)} ± {form.replace('+', '').format(max(abs(v - mean) for v in values))}"


def plot(arms: list[Arm], steps: int, heldout: str, path: Path) -> None:
    """Loss over FLOPs, undecayed and decayed, and the undecayed difference to scratch at equal FLOPs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplot_mosaic(
        [["trunks", "decayed"], ["difference", "difference"]], figsize=(12, 9), layout="constrained"
    )
    scratch = {arm.seed: arm for arm in arms if arm.op == "scratch"}
    growth_steps = sorted({arm.grown_at for arm in arms if arm.grown_at})
    for name in dict.fromkeys(arm.name for arm in arms):
        group = [arm for arm in arms if arm.name == name]
        op, grown_at = group[0].op, group[0].grown_at
        style = {
            "color": COLORS.get(op, "#111827"),
            "linestyle": LINES[growth_steps.index(grown_at) % len(LINES)] if grown_at else "-",
            "linewidth": 1.2,
        }
        flops, losses = _mean_curve(group, heldout)
        shown = flops >= 0.1 * flops[-1]
        axes["trunks"].plot(flops[shown], losses[shown], **style)
        ends = [[(p.flops, p.losses[heldout]) for p in arm.decayed] for arm in group]
        whole = [points for points in ends if len(points) == max(map(len, ends))]
        axes["decayed"].plot(*np.mean(whole, axis=0).T, **style, label=name)
        for points in ends:
            axes["decayed"].plot(*np.transpose(points), "o", color=style["color"], markersize=3.5, alpha=0.7)
        for arm in group if grown_at else ():
            x, y = _difference(arm, scratch[arm.seed], heldout)
            axes["difference"].plot(x, y, **style)
    goal = statistics.fmean(_at(arm, steps).losses[heldout] for arm in scratch.values())
    axes["decayed"].axhline(goal, color="#6b7280", linewidth=0.8, linestyle=":")
    axes["decayed"].legend(frameon=False, fontsize=8)
    axes["difference"].axhline(0, color="#111827", linewidth=0.8)
    for name, title in (
        ("trunks", "undecayed, mean of the seeds"),
        ("decayed", "decayed; dots are seeds, the dotted line is scratch at its full length"),
        ("difference", "undecayed, minus scratch of the same seed at equal FLOPs"),
    ):
        axes[name].set(title=title, xscale="log", ylabel=f"nats a token, {heldout}")
        axes[name].set_xlabel("training FLOPs, the base's included")
        axes[name].title.set_fontsize(9)
        axes[name].grid(alpha=0.25, which="both")
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
