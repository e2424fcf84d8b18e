"""The report of a study: its table and its picture."""

import itertools
import json
import math
import statistics
from pathlib import Path

from stacking.study.plot import plot
from stacking.study.results import Arm, Point


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
    """One row per arm: losses and differences to the scratch of the same seed, mean over the seeds and how
    far the seeds lie from it."""
    scratch = {arm.seed: arm.at(steps) for arm in arms if arm.op == "scratch"}
    rows = [
        "| arm | peak lr | loss, equal tokens | - scratch | FLOPs there | loss, equal FLOPs | - scratch | "
        "FLOPs to scratch's loss |\n|---|---|---|---|---|---|---|---|"
    ]
    for name in dict.fromkeys(arm.name for arm in arms):
        group = [arm for arm in arms if arm.name == name]
        equal_tokens = {arm.seed: arm.at(steps) for arm in group}
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
        f"\nHeld-out set {heldout}, nats per token; mean over {len(scratch)} seeds where nothing else is "
        "said, after ± the largest distance of a seed from it. Differences are to scratch of the same seed, "
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


def _spread(values: list[float], form: str) -> str:
    mean = statistics.fmean(values)
    if len(values) == 1:
        return form.format(mean)
    return f"{form.format(mean)} ± {form.replace('+', '').format(max(abs(v - mean) for v in values))}"
