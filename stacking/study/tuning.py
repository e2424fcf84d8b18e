"""Tuning: a grid of runs, and where the loss is lowest along the peak learning rate.

Every block [[runs]] is a grid over its lists. In the report, runs that differ in nothing but peak rate and
seed are one row: the best rate tried, and the minimum of a parabola in log2 of the rate.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from core.errors import UserError
from core.run.settings import FREE_SETTINGS
from stacking.study.definition import Definition, combinations, open_settings
from stacking.study.fits import Optimum, fit_optimum, fit_powers
from stacking.study.results import CHOSEN, Results, as_floats, told
from stacking.study.runs import Run

ALONG = ("lr", "seed")
RULED = (
    "preset",
    "d_model",
    "n_layers",
    "n_heads",
    "d_mlp",
    "batch",
    "grad_accum_steps",
    "steps",
    "optimizer",
)
"""Settings whose effect on the best rate the rule is to say, or that have none."""
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999",
)  # fmt: skip

ROUND = (
    (100,), (100, 200, 500), (100, 150, 200, 300, 400, 500, 600, 800),
    (*range(100, 200, 20), *range(200, 1000, 50)), range(100, 1000, 10), range(100, 1000, 5),
    range(100, 1000),
)  # fmt: skip
"""Hundredths of a power of ten at which an axis of rates may have its ticks."""


def runs(definition: Definition, _: Results) -> list[Run]:
    """Every run of the grids."""
    found: dict[str, Run] = {}
    for block in definition.blocks:
        for name, given in combinations(block, set()):
            if name in found:
                raise UserError(f"runs {block['name']} has {name} twice: give every value once")
            settings = open_settings(block["name"], given)
            found[name] = Run(name, settings, settings.steps, {"block": block["name"]})
    return list(found.values())


def groups(results: Results) -> list[list[dict[str, Any]]]:
    """The runs that have ended, those together that differ in peak rate and seed alone."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in results.entries:
        alike = {k: v for k, v in told(entry).items() if k not in ALONG}
        key = repr((sorted(alike.items()), entry["fingerprint"]))
        found.setdefault(key, []).append(entry)
    return list(found.values())


def varied(entries: list[dict[str, Any]]) -> list[str]:
    """The settings in which runs differ, but for peak rate and seed."""
    names = dict.fromkeys(name for entry in entries for name in entry["settings"])
    values = {name: {repr(entry["settings"].get(name)) for entry in entries} for name in names}
    return [name for name in names if name not in ALONG and len(values[name]) > 1]


def labels(groups: list[list[dict[str, Any]]]) -> list[str]:
    """What tells each group from the others: the settings given in which they differ; and what a preset gave,
    where others of its length have it otherwise."""
    names = varied([entry for group in groups for entry in group])
    twins: dict[str, list[dict[str, Any]]] = {}
    for first, *_ in groups:
        twins.setdefault(_apart(first), []).append(told(first))
    words = []
    for first, *_ in groups:
        given, own, others = first["settings"], told(first), twins[_apart(first)]
        of_preset = [name for name in CHOSEN if name not in (*ALONG, *given)]
        shown = {n: own[n] for n in of_preset if any(other.get(n) != own.get(n) for other in others)}
        words.append(_label(shown | {name: value for name, value in given.items() if name in names}))
    return words


def _apart(entry: dict[str, Any]) -> str:
    """What tells a run but for what presets give."""
    return repr(sorted((name, repr(value)) for name, value in told(entry).items() if name not in CHOSEN))


def _label(given: dict[str, Any]) -> str:
    words = [str(given["preset"])] if "preset" in given else []
    words += [
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in given.items()
        if name != "preset"
    ]
    return ", ".join(words) or "all"


def by_rate(group: list[dict[str, Any]], heldout: str) -> dict[float, list[float]]:
    """The losses of a group's seeds at each rate; none at one that came to no finite loss."""
    found: dict[float, list[float]] = {}
    for entry in group:
        losses = found.setdefault(entry["lr"], [])
        loss = math.nan if entry["halted"] else as_floats(entry["losses"])[heldout]
        if math.isfinite(loss):
            losses.append(loss)
    return dict(sorted(found.items()))


def optimum(group: list[dict[str, Any]], heldout: str) -> Optimum | None:
    """The fitted best rate of a group."""
    return fit_optimum(
        [
            (entry["lr"], as_floats(entry["losses"])[heldout], entry["seed"])
            for entry in group
            if not entry["halted"]
        ]
    )


def means(group: list[dict[str, Any]], heldout: str) -> dict[float, float]:
    """The mean loss of a group's seeds at each rate that came to one."""
    rates = by_rate(group, heldout)
    return {rate: statistics.fmean(losses) for rate, losses in rates.items() if losses}


def table(results: Results, heldout: str) -> str:
    """The best rates, the rule they would make, and every run."""
    ended = groups(results)
    columns = ["runs", "steps", "tokens", "rates tried", "best tried", f"{heldout} there", "fitted best rate",
               "loss there"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for words, group in zip(labels(ended), ended, strict=True):
        rates = by_rate(group, heldout)
        cells = [words, f"{group[0]['steps']:,}", f"{tokens_of(group[0]) / 1e6:.4g}M"]
        cells.append(" ".join(f"{rate:g}" for rate in rates))
        if found := means(group, heldout):
            best = min(found, key=found.get)
            cells += [f"{best:g}", _spread(rates[best]), *_fitted(optimum(group, heldout), found)]
        else:
            cells += ["all halted", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(
        f"\n{heldout}: nats per token; after ± the largest distance of a seed from the mean. Fitted: the "
        "minimum of a parabola in log2 of the rate, each seed at a level of its own; its standard error, as "
        "a factor, where there are runs to spare.\n"
    )
    return "\n".join([*lines, *_rules(ended, heldout), "", *_all_runs(ended)])


def tokens_of(entry: dict[str, Any]) -> int:
    """Tokens that a run trains on."""
    return entry["steps"] * entry["batch"] * entry["model"]["context"]


def _spread(losses: list[float]) -> str:
    mean = statistics.fmean(losses)
    if len(losses) == 1:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {max(abs(loss - mean) for loss in losses):.4f} ({len(losses)} seeds)"


def _fitted(fit: Optimum | None, tried: Mapping[float, float]) -> list[str]:
    if fit is None:
        return ["needs three rates", ""]
    if not fit.is_minimum:
        return ["no minimum: widen the grid", ""]
    error = "" if fit.error is None else f", to a factor of {2**fit.error:.2f}"
    where = ""
    if not min(tried) < fit.rate < max(tried):
        where = ", outside the rates tried"
    elif not fit.is_inside(tried):
        where = ", but the best tried is at an edge"
    return [f"{fit.rate:.2e}{error}{where}", f"{fit.loss:.4f}"]


def _rules(ended: list[list[dict[str, Any]]], heldout: str) -> list[str]:
    """For each optimizer how the best rate moves with size, batch and length, by the bracketed minima of runs
    that have all else in common; or why they do not say."""
    lines = []
    for optimizer in dict.fromkeys(group[0]["optimizer"] for group in ended):
        alike: dict[str, list[tuple[dict[str, float], float]]] = {}
        for group in ended:
            fit, first = optimum(group, heldout), group[0]
            if first["optimizer"] == optimizer and fit and fit.is_inside(means(group, heldout)):
                sizes = {name: first["model"][name] for name in ("width", "layers")}
                at = {**sizes, "batch": first["batch"], "tokens": tokens_of(first)}
                alike.setdefault(_all_else(first), []).append((at, fit.rate))
        points = max(alike.values(), key=len, default=[])
        others = sum(map(len, alike.values())) - len(points)
        apart = f" ({others} of runs with other settings left out)" if others else ""
        minima = f"{len(points)} bracketed minim{'um' if len(points) == 1 else 'a'}"
        said, powers = f"{optimizer}, {minima}{apart}", fit_powers(points)
        if isinstance(powers, str):
            lines.append(f"{said}: no rule yet, {powers}.")
            continue
        middle = statistics.geometric_mean(rate for _, rate in points)
        factors = [f"{middle:.3g}"]
        for name, (power, error) in powers.items():
            unit = statistics.geometric_mean(at[name] for at, _ in points)
            factors.append(f"({name} / {unit:.4g})^({power:.2f} ± {error:.2f})")
        lines.append(f"{said}: best rate = {' '.join(factors)}.")
    return lines


def _all_else(entry: dict[str, Any]) -> str:
    """What the settings of a run say but for rate, seed, size, batch and length; its warmup in sequences."""
    given = told(entry)
    rest = {name: value for name, value in given.items() if name not in {*ALONG, *RULED, *FREE_SETTINGS}}
    return repr(sorted((rest | {"warmup": given["warmup"] * entry["batch"]}).items()))


def _all_runs(ended: list[list[dict[str, Any]]]) -> list[str]:
    entries = [entry for group in ended for entry in sorted(group, key=lambda e: (e["lr"], e["seed"]))]
    sets = list(dict.fromkeys(name for entry in entries for name in entry.get("losses", ())))
    columns = ["run", "peak rate", "seed", *sets, "skipped updates", "tokens/s"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for entry in entries:
        losses, speed = as_floats(entry.get("losses", {})), entry["tokens_per_second"]
        cells = [entry["name"], f"{entry['lr']:g}", str(entry["seed"])]
        missing = "halted" if entry["halted"] else ""
        cells += [f"{losses[name]:.4f}" if name in losses else missing for name in sets]
        cells += [str(entry["skipped"]), "" if speed is None else f"{speed:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(results: Results, heldout: str, axes: Any) -> None:
    """Loss over peak rate, a line per group of at least two rates through the means of its seeds; a point per
    group until there is such a one."""
    counts = [(group, sum(map(bool, by_rate(group, heldout).values()))) for group in groups(results)]
    most = min(2, max((n for _, n in counts), default=1))
    ended = [group for group, n in counts if n >= max(most, 1)]
    for i, (words, group) in enumerate(zip(labels(ended), ended, strict=True)):
        rates = {rate: losses for rate, losses in by_rate(group, heldout).items() if losses}
        words = f"{words}, {tokens_of(group[0]) / 1e6:.3g}M tokens"
        style = {"color": COLORS[i % len(COLORS)], "marker": "osD^v"[i // len(COLORS) % 5]}
        axes.plot(list(rates), [statistics.fmean(losses) for losses in rates.values()], label=words, **style)
        dots = [(rate, loss) for rate, losses in rates.items() for loss in losses]
        axes.plot(*zip(*dots, strict=True), ".", color=style["color"], alpha=0.6)
        fit = optimum(group, heldout)
        if fit is not None and fit.is_inside(means(group, heldout)):
            axes.plot(fit.rate, fit.loss, "*", color=style["color"], markersize=13, markeredgecolor="white")
    axes.set_xscale("log")
    ticks = round_rates(*axes.get_xlim())
    axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
    axes.minorticks_off()
    axes.set(xlabel="peak learning rate", title="Loss over peak rate; stars: bracketed minima")


def round_rates(low: float, high: float) -> list[float]:
    """Round numbers from low to high, in the coarsest of `ROUND` that gives three of them, if any does."""
    found: list[float] = []
    for steps in ROUND:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        numbers = [float(f"{step}e{decade - 2}") for decade in decades for step in steps]
        found = [number for number in numbers if low <= number <= high]
        if len(found) >= 3:
            break
    return found
