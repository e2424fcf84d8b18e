"""Saturation: decays that branch off one trunk at more and more tokens per parameter.

A block [[runs]] is a trunk (its lists are axes, as in tuning) with `tokens_per_parameter`, the lengths of its
decayed runs; all parameters count, embeddings included. The shortest of all blocks are trained first.
"""

import math
from typing import Any

import numpy as np

from core import checks
from core.errors import UserError
from core.run.schedule import decay_steps
from stacking.study.definition import Definition, combinations, open_settings
from stacking.study.fits import Law, fit_law
from stacking.study.results import Results, as_floats
from stacking.study.runs import TRUNK, Run

LENGTHS = "tokens_per_parameter"
FAR = 350  # tokens per parameter: the 14B of train_tpu/recipes/mtlm2.sh
WORTH = 0.5  # of a new token: where a repeated one is worth less, the table says so


def runs(definition: Definition, _: Results) -> list[Run]:
    """The decayed runs, those of the fewest tokens per parameter first."""
    found: list[tuple[float, Run]] = []
    for block in definition.blocks:
        lengths = block.get(LENGTHS)
        if not isinstance(lengths, list) or not lengths:
            raise UserError(f"runs {block['name']} need {LENGTHS}, a list")
        for length in lengths:
            checks.positive(**{f"{block['name']}.{LENGTHS}": length})  # no option of the command line
        if len(set(lengths)) < len(lengths):
            raise UserError(f"runs {block['name']} have a value of {LENGTHS} twice: give every value once")
        for name, given in combinations(block, {LENGTHS}):
            found += _branches(block["name"], name, given, sorted(lengths))
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def _branches(block: str, name: str, given: dict[str, Any], lengths: list[float]) -> list[tuple[float, Run]]:
    if "steps" in given or "tokens" in given:
        raise UserError(f"runs {block}: {LENGTHS} says how long they are: leave steps and tokens out")
    settings = open_settings(block, given)
    if settings.config.weights:
        raise UserError(
            f"runs {block}: the law counts the passes over a text, and each source of a mixture has a number "
            "of its own: prepare them together, as one text"
        )
    optim = settings.config.optim
    if optim.lr is None:
        raise UserError(f"runs {block}: give lr: the runs of a trunk differ in length, and all have its rate")
    if optim.schedule != "wsd" or not optim.decay:
        raise UserError(f"runs {block}: decays branch off a trunk, so schedule must be wsd, with a decay")
    steps = [max(2, round(x * settings.model.n_params / settings.batch_tokens)) for x in lengths]
    starts = [n - max(1, decay_steps(optim, n)) for n in steps]
    if starts[0] < optim.warmup:
        raise UserError(
            f"runs {block}: the first decay begins at step {starts[0]}, within the warmup of {optim.warmup}: "
            f"give a smaller warmup or larger {LENGTHS}"
        )
    labels = {"block": block, "seed": settings.config.seed}
    keep = tuple(sorted(set(starts)))
    trunk = Run(f"{name}/trunk", settings, TRUNK, {**labels, "trunk": True}, keep=keep)
    return [
        (x, Run(f"{name}/decayed-{x:g}", settings, n, {**labels, LENGTHS: x}, source=trunk, at=start))
        for x, n, start in zip(lengths, steps, starts, strict=True)
    ]


def ends(results: Results) -> list[dict[str, Any]]:
    """The decayed runs that have ended with a loss."""
    return [e for e in results.runs.values() if LENGTHS in e["labels"] and not e["halted"]]


def halted(results: Results) -> list[str]:
    """In words, the decayed runs that the guard ended, and those that have no trunk to branch off from
    because it ended that."""
    found = []
    for entry in results.runs.values():
        labels = entry["labels"]
        if LENGTHS not in labels or not entry["halted"]:
            continue
        step = entry.get("halted_at")  # not in results of 2026-11-30 and before
        where = "" if step is None else f" at step {step:,}"
        trunk = " with its trunk" if step is not None and step <= entry["at"] else ""
        found.append(
            f"{entry['from'].removesuffix('/trunk')}, seed {labels['seed']}, {labels[LENGTHS]:g} tokens per "
            f"parameter, was halted by the guard{trunk}{where}"
        )
    return found


def models(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The decayed runs of each model, over all its lengths, texts and seeds, by its number of parameters and
    the settings in which models of that size differ."""
    found: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for entry in ends(results):
        given = {name: value for name, value in entry["settings"].items() if name != "seed"}
        alike = found.setdefault(entry["model"]["parameters"], {})
        alike.setdefault(repr(sorted(given.items())), []).append(entry)
    named = {}
    for size, alike in found.items():
        settings = [entries[0]["settings"] for entries in alike.values()]
        names = dict.fromkeys(name for given in settings for name in given if name != "seed")
        differ = [name for name in names if len({repr(given.get(name)) for given in settings}) > 1]
        for given, entries in zip(settings, alike.values(), strict=True):
            words = [f"{name} {given[name]}" for name in differ if name in given]
            named[", ".join([f"{size:,} parameters", *words])] = entries
    return named


def fit(entries: list[dict[str, Any]], heldout: str) -> Law | None:
    """The law of one model, over all its lengths and texts."""
    return fit_law(*_points(entries, heldout))


def _points(entries: list[dict[str, Any]], heldout: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, distinct ones and losses of the runs with a finite loss."""
    entries = [entry for entry in entries if math.isfinite(as_floats(entry["losses"])[heldout])]
    return (
        np.array([entry["tokens"] for entry in entries], float),
        np.array([entry["distinct_tokens"] for entry in entries], float),
        np.array([as_floats(entry["losses"])[heldout] for entry in entries]),
    )


def table(results: Results, heldout: str) -> str:
    """Every decayed run, and the law of each model."""
    sets = list(dict.fromkeys(name for entry in ends(results) for name in entry["losses"]))
    lines = [
        "| runs | seed | tokens per parameter | tokens | passes over the text | FLOPs | "
        f"{' | '.join(sets)} | the law's {heldout} |",
        "|" + "---|" * (7 + len(sets)),
    ]
    found = models(results)
    laws = {name: fit(entries, heldout) for name, entries in found.items()}
    law_of = {id(entry): laws[name] for name, entries in found.items() for entry in entries}
    for entry in ends(results):
        tokens, distinct, losses = entry["tokens"], entry["distinct_tokens"], as_floats(entry["losses"])
        law = law_of[id(entry)]
        expected = "" if law is None else f"{law.loss(tokens, distinct):.4f}"
        cells = [
            entry["from"].removesuffix("/trunk"), str(entry["labels"]["seed"]),
            f"{entry['labels'][LENGTHS]:g}",
            _count(tokens), f"{tokens / distinct:.2f}", f"{entry['flops']:.3g}",
            *(f"{losses[name]:.4f}" if name in losses else "" for name in sets), expected,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Decayed runs; nats per token; the law is fitted to {heldout}."]
    lines += [f"\n{which}." for which in halted(results)]
    for name, law in laws.items():
        lines.append(_describe(name, law, found[name], heldout))
    return "\n".join(lines)


def _describe(name: str, law: Law | None, entries: list[dict[str, Any]], heldout: str) -> str:
    if law is None:
        return (
            f"\n{name}: {len(entries)} runs determine no law. That takes losses that fall over three lengths "
            "at least, by less with every doubling, and a fourth run where tokens are repeated."
        )
    floor, scale, power, passes = [*(law.errors or []), None, None, None, None][:4]
    far = FAR * entries[0]["model"]["parameters"]
    text = (
        f"\n{name}, {len(entries)} runs: loss = {_said(law.floor, floor)} + "
        f"({_said(law.scale, scale)}) (T / {_count(law.unit)})^-({_said(law.power, power)}), T: effective "
        f"tokens. Extrapolated to {FAR} new tokens per parameter ({_count(far)}): "
        f"{_said(law.loss(far, far), law.error(far, far))}."
    )
    errors = (
        f"Errors: one standard error, if the law holds. {_how_well_it_holds(law, entries, heldout, far)}"
        if law.errors
        else "There are only as many runs as the law has parameters: it passes through all of them, so its "
        "error is not known, and what it extrapolates may be far off."
    )
    if not np.isfinite(law.passes):
        return f"{text} No run repeats its text. {errors}"
    if passes is None:
        factor = ""
    elif passes < np.log(1000):
        factor = f", give or take a factor of {np.exp(passes):.3g}"
    else:
        factor = ", which these runs do not determine"
    half = 1 + law.passes * np.log(1 / WORTH)
    return (
        f"{text} All repetitions together are worth at most {law.passes:.3g} more passes{factor}: after pass "
        f"{half:.2g} a token is worth less than {WORTH:g} of a new one. {errors}"
    )


def _how_well_it_holds(law: Law, entries: list[dict[str, Any]], heldout: str, far: float) -> str:
    """How far it is from its runs, and what becomes of it without the shortest, for which it fails first."""
    tokens, distinct, losses = _points(entries, heldout)
    missed = float(np.sqrt(((law.loss(tokens, distinct) - losses) ** 2).mean()))
    said = f"It misses these runs by {missed:.2g} nats (root mean square)"
    kept = tokens > tokens.min()
    longer = fit_law(tokens[kept], distinct[kept], losses[kept])
    if longer is None:
        return f"{said}; without the shortest, the others determine none."
    said += f"; without the shortest, {longer.loss(far, far):.4g} is extrapolated"
    return f"{said}." if not np.isfinite(longer.passes) else f"{said}, and {longer.passes:.3g} more passes."


def _count(tokens: float) -> str:
    """14.1B, 130.6M or 57,856."""
    if tokens >= 1e9:
        return f"{tokens / 1e9:.3g}B"
    return f"{tokens / 1e6:.1f}M" if tokens >= 1e6 else f"{tokens:,.0f}"


def _said(value: float, error: float | None) -> str:
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def plot(results: Results, heldout: str, axes: Any) -> None:
    """Decayed losses over tokens, and the law of each model and text."""
    for i, (name, entries) in enumerate(models(results).items()):
        law = fit(entries, heldout)
        for j, distinct in enumerate(sorted({entry["distinct_tokens"] for entry in entries}, reverse=True)):
            group = [entry for entry in entries if entry["distinct_tokens"] == distinct]
            tokens = np.array([entry["tokens"] for entry in group], float)
            losses = [as_floats(entry["losses"])[heldout] for entry in group]
            label = f"{name}, {_count(distinct)} distinct tokens"
            axes.plot(tokens, losses, "osD^v"[j % 5], color=f"C{i}", label=label)
            if law is not None:
                x = np.geomspace(tokens.min(), tokens.max(), 100)
                shown = law.loss(x, np.full_like(x, distinct))
                axes.plot(x, shown, color=f"C{i}", linestyle=("-", "--", ":")[j % 3], linewidth=1)
    axes.set_xscale("log")
    axes.set(xlabel="tokens trained on", title="Decayed loss over tokens; lines: the fitted law")
