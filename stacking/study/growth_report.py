"""The report of a study of growth: losses and FLOPs of its arms, compared seed by seed, and their picture."""

import dataclasses
import itertools
import math
import statistics
from typing import Any, NamedTuple

import numpy as np

from core.errors import UserError
from stacking.study.growth import SCRATCH, SMALL
from stacking.study.results import Results, as_floats

# Okabe and Ito's colours, which colour-blind readers can tell apart; one an operator.
COLORS = {
    "scratch": "#000000", "small": "#999999", "stack": "#0072B2", "interleave": "#D55E00",
    "identity": "#009E73", "random": "#CC79A7", "overlap": "#E69F00", "middle": "#56B4E9",
}  # fmt: skip
LINES = ("-", "--", ":", "-.")  # by growth step


class Point(NamedTuple):
    """A held-out loss somewhere in an arm."""

    steps: int
    flops: float
    """Of all training until there, the small model's included."""
    loss: float
    """Nats per token."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm's losses, at the ends of its decayed runs."""

    op: str
    grown_at: int
    seed: int
    lr: float
    decayed: tuple[Point, ...]
    """By FLOPs."""
    equal_tokens: Point | None = None
    """The decayed run of the target's length."""
    parameters: int = 0
    flops_per_token: int = 0
    """Of training."""
    flops_per_step: int = 0

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return arm_name(self.op, self.grown_at)

    def there(self, flops: float) -> Point | None:
        """Its decayed run of so many FLOPs; None while there is none. Lengths are whole updates: within half
        of one."""
        return next((p for p in self.decayed if abs(p.flops - flops) <= 0.51 * self.flops_per_step), None)


def arm_name(op: str, at: int) -> str:
    """An arm in words; at: its step of growth, or 0."""
    return f"{op} at {at}" if at else op


def read_arms(results: Results, heldout: str) -> tuple[list[Arm], list[str]]:
    """The arms at their best rates; and remarks, on rates at an edge and arms that the guard halted.

    Raises:
        UserError: scratch has not been decayed at its full length yet.
    """
    arms, halted = _all_arms(results, heldout)
    rates, edges = _best_rates(arms)
    chosen = [
        arm for arm in arms
        if arm.equal_tokens is not None and arm.lr == rates.get((arm.op, arm.grown_at))
    ]  # fmt: skip
    seeds = {arm.seed for arm in chosen if arm.op == SCRATCH}
    chosen = [arm for arm in chosen if arm.seed in seeds]
    if not chosen:
        if any(which.startswith(f"{SCRATCH},") for which in halted):
            raise UserError(f"the guard halted scratch in every seed of {results.path}: give a smaller lr")
        raise UserError(f"{results.path} holds no decayed scratch run yet: train more of the study")
    order = {SCRATCH: 0, SMALL: 1}
    chosen.sort(key=lambda arm: (order.get(arm.op, 2), arm.grown_at, arm.seed))
    return chosen, edges + list(dict.fromkeys(halted))


def _all_arms(results: Results, heldout: str) -> tuple[list[Arm], list[str]]:
    """The arms of every seed at every rate; and what the guard halted, in words."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for entry in results.runs.values():
        labels = entry["labels"]
        found.setdefault((labels["arm"], labels["grown_at"], labels["seed"], labels["lr"]), []).append(entry)
    arms, halted = [], []
    for (op, at, seed, lr), entries in found.items():
        decayed, equal, model = [], None, entries[0]["model"]
        for entry in entries:
            if entry["labels"].get("trunk"):
                continue
            if entry["halted"]:
                halted.append(f"{arm_name(op, at)}, seed {seed}, peak lr {lr:g}, was halted by the guard")
            else:
                decayed.append(Point(entry["steps"], entry["flops"], as_floats(entry["losses"])[heldout]))
                equal = decayed[-1] if entry["labels"]["equal_tokens"] else equal
        decayed.sort(key=lambda point: point.flops)
        per_token = model["flops_per_token"]
        sizes = (model["parameters"], per_token, per_token * model["context"] * entries[0]["batch"])
        arms.append(Arm(op, at, seed, lr, tuple(decayed), equal, *sizes))
    return arms, halted


def _best_rates(arms: list[Arm]) -> tuple[dict[tuple[str, int], float], list[str]]:
    """The best rate of every (operator, step of growth), tuned at equal tokens on the seed with the most
    rates; and in words which of them are at the edge of the rates tried, or lack some."""
    losses: dict[tuple[str, int], dict[int, dict[float, float]]] = {}
    for arm in arms:
        if arm.equal_tokens is not None and math.isfinite(arm.equal_tokens.loss):
            tried = losses.setdefault((arm.op, arm.grown_at), {}).setdefault(arm.seed, {})
            tried[arm.lr] = arm.equal_tokens.loss
    tuned = {arm: max(seeds.values(), key=len) for arm, seeds in losses.items()}
    most = sorted(max((set(tried) for tried in tuned.values()), key=len, default=set()))
    rates, edges = {}, []
    for (op, at), tried in tuned.items():
        name = arm_name(op, at)
        rates[op, at] = rate = min(tried, key=tried.get)
        if missing := [f"{lr:g}" for lr in most if lr not in tried]:
            edges.append(f"{name} has no loss at {', '.join(missing)}, where others do")
        if len(tried) > 1 and rate in (min(tried), max(tried)):
            where = "below" if rate == min(tried) else "above"
            edges.append(f"{name} was best at the edge of its rates, {rate:g}: its best may lie {where}")
    return rates, edges


def table(results: Results, heldout: str) -> str:
    """One row per arm, then the arms at the FLOPs of each grown one, and remarks."""
    arms, remarks = read_arms(results, heldout)
    lines = [make_table(arms), "", *at_equal_flops(arms)]
    lines.append(
        f"\nHeld-out set {heldout}, nats per token; mean over the seeds, after ± the largest distance of a "
        "seed from it. Differences are to scratch of the same seed, decayed at its full length. FLOPs count "
        "the small model's. Inference: forward MFLOPs per token."
    )
    return "\n".join([*lines, *(f"{remark}." for remark in remarks)])


def make_table(arms: list[Arm]) -> str:
    """One row per arm: losses and differences to the scratch of the same seed, mean over the seeds and how
    far the seeds lie from it."""
    scratch = {arm.seed: arm.equal_tokens for arm in arms if arm.op == SCRATCH}
    rows = [
        "| arm | peak lr | parameters | inference | loss, equal tokens | - scratch | FLOPs there | loss, "
        "equal FLOPs | - scratch | FLOPs to scratch's loss |\n|---|---|---|---|---|---|---|---|---|---|"
    ]
    for name in dict.fromkeys(arm.name for arm in arms):
        group = [arm for arm in arms if arm.name == name]
        equal_tokens = {arm.seed: arm.equal_tokens for arm in group}
        part = equal_tokens[group[0].seed].flops / scratch[group[0].seed].flops
        cells = [
            name,
            f"{group[0].lr:g}",
            f"{group[0].parameters:,}",
            f"{group[0].flops_per_token / 3e6:.0f}",
        ]
        cells += [*_losses(equal_tokens, scratch), f"{part:.3f}"]
        if name == SCRATCH:
            cells[5] = ""
            rows.append("| " + " | ".join([*cells, *[""] * 3]) + " |")
            continue
        longer = {arm.seed: arm.there(scratch[arm.seed].flops) for arm in group}
        longer = {seed: point for seed, point in longer.items() if point is not None}
        cells += _losses(longer, scratch)
        saved = []
        for arm in (arm for arm in group if arm.seed in longer):
            goal = scratch[arm.seed]
            flops, mark = flops_to_reach([(point.flops, point.loss) for point in arm.decayed], goal.loss)
            saved.append((100 * (flops / goal.flops - 1), mark))
        rows.append("| " + " | ".join([*cells, _saved(saved) + _few(len(saved), len(scratch))]) + " |")
    return "\n".join(rows)


def at_equal_flops(arms: list[Arm]) -> list[str]:
    """A table of what the FLOPs of each grown arm buy: grown, scratch and small, each decayed there."""
    scratch = {arm.seed: arm.equal_tokens for arm in arms if arm.op == SCRATCH}
    rows = [
        "| grown arm | FLOPs | its loss | - scratch decayed there | - small decayed there |\n"
        "|---|---|---|---|---|"
    ]
    for name in dict.fromkeys(arm.name for arm in arms if arm.grown_at):
        group = {arm.seed: arm.equal_tokens for arm in arms if arm.name == name}
        first = next(iter(group))
        cells = [name, f"{group[first].flops / scratch[first].flops:.3f}"]
        cells.append(_spread([point.loss for point in group.values()], "{:.4f}"))
        for rival in (SCRATCH, SMALL):
            differences = []
            for arm in (arm for arm in arms if arm.op == rival and arm.seed in group):
                point = arm.there(group[arm.seed].flops)
                differences += [] if point is None else [group[arm.seed].loss - point.loss]
            cells.append(
                (_spread(differences, "{:+.4f}") if differences else "") + _few(len(differences), len(group))
            )
        rows.append("| " + " | ".join(cells) + " |")
    return rows


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


def _losses(points: dict[int, Point], scratch: dict[int, Point]) -> list[str]:
    """Cells of the loss and of its difference to scratch, seed by seed."""
    if not points:
        return ["", ""]
    differences = [point.loss - scratch[seed].loss for seed, point in points.items()]
    few = _few(len(points), len(scratch))
    return [
        _spread([point.loss for point in points.values()], "{:.4f}") + few,
        _spread(differences, "{:+.4f}") + few,
    ]


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


def _spread(values: list[float], form: str) -> str:
    mean = statistics.fmean(values)
    if len(values) == 1:
        return form.format(mean)
    return f"{form.format(mean)} ± {form.replace('+', '').format(max(abs(v - mean) for v in values))}"


def plot(results: Results, heldout: str, axes: Any) -> None:
    """Decayed losses over FLOPs: a dot per seed, a line per arm through their means."""
    arms, _ = read_arms(results, heldout)
    scratch = {arm.seed: arm.equal_tokens for arm in arms if arm.op == SCRATCH}
    unit = next(iter(scratch.values())).flops
    growth_steps = sorted({arm.grown_at for arm in arms if arm.grown_at})
    for name in dict.fromkeys(arm.name for arm in arms):
        group = [arm for arm in arms if arm.name == name]
        at = group[0].grown_at
        line = LINES[growth_steps.index(at) % len(LINES)] if at else "-"
        longest = max(([point.steps for point in arm.decayed] for arm in group), key=len)
        whole = [arm for arm in group if [point.steps for point in arm.decayed] == longest]
        few = f" ({len(whole)} of {len(scratch)} seeds finished)" if len(whole) < len(scratch) else ""
        mean = np.mean([[(p.flops / unit, p.loss) for p in arm.decayed] for arm in whole], axis=0)
        color = COLORS[group[0].op]
        axes.plot(*mean.T, color=color, linestyle=line, linewidth=1.4, label=name + few)
        for point in (point for arm in group for point in arm.decayed):
            axes.plot(point.flops / unit, point.loss, "o", color=color, markersize=3.5, alpha=0.7)
    goal = statistics.fmean(point.loss for point in scratch.values())
    axes.axhline(goal, color="#6b7280", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="training FLOPs, the small model's included (scratch = 1)",
        title="Decayed loss: a dot per seed, lines through the means of finished seeds; "
        "dotted: scratch at its full length",
    )
