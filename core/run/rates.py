"""The peak learning rate of a run that is given none.

Its preset's; Muon's is moved by a rule to other widths, batches and lengths.
"""

import dataclasses
from typing import Any

from core.config import ModelConfig, preset
from core.run.presets import TRAINING_DEFAULTS

# The powers of Muon's best peak rate, and between which values they were measured. Further off, the rate is
# that of the nearest of them. docs/RESULTS.md has the minima; the number of layers was not varied alone.
RULE = {
    "width": (-0.87, 192, 768),
    "batch": (0.51, 2**16, 2**17),  # in tokens
    "length": (-0.46, 65.0e6, 261.3e6),  # in tokens
}


def with_rate(config: Any, model: ModelConfig, steps: int | None) -> tuple[Any, list[tuple[str, str]]]:
    """The settings of a run of `steps` updates with a peak rate; and for its table, where that is not the
    preset's, how it came to be.

    steps: None where they are not known: then a rate that depends on them stays None.
    """
    name, optimizer = config.preset, config.optim.optimizer
    if config.optim.lr is not None or (steps is None and has_rule(name, optimizer)):
        return config, []
    lr, of_preset = peak_rate(name, optimizer, model, config.batch, steps), preset_rate(name, optimizer)
    rows = []
    if lr != of_preset:
        here = place(model, config.batch, steps)
        update = f"{config.batch} x {model.context} per update"
        sizes = f"width {model.d_model}, {update}, {here['length']:,} tokens"
        beyond = [what for what, value in here.items() if not within(what, value)]
        edge = f"; beyond what was measured in {' and '.join(beyond)}, so as at its edge" if beyond else ""
        rows.append(("learning rate", f"{lr:g}: the preset's {of_preset:g}, by the rule for {sizes}{edge}"))
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=lr)), rows


def is_derived(config: Any, model: ModelConfig) -> bool:
    """Whether the rate of these settings is what `with_rate` gives them without --lr."""
    optim = config.optim
    return optim.lr == peak_rate(config.preset, optim.optimizer, model, config.batch, config.steps)


def preset_rate(name: str, optimizer: str) -> float:
    """The preset's own."""
    return TRAINING_DEFAULTS[name]["lr" if optimizer == "muon" else "adamw_lr"]


def has_rule(name: str, optimizer: str) -> bool:
    """Whether the rule leads from the preset's rate to others."""
    return optimizer == "muon" and "tokens" in TRAINING_DEFAULTS[name]


def peak_rate(name: str, optimizer: str, model: ModelConfig, batch: int, steps: int | None) -> float:
    """The rate, to three digits, for updates of `batch` sequences; steps: None only where there is no
    rule."""
    rate = preset_rate(name, optimizer)
    if not has_rule(name, optimizer):
        return rate
    given, own = TRAINING_DEFAULTS[name], preset(name)
    here, there = place(model, batch, steps), place(own, given["batch"], 1) | {"length": given["tokens"]}
    for what, (power, low, high) in RULE.items():
        now, then = (min(max(values[what], low), high) for values in (here, there))
        rate *= (now / then) ** power
    return float(f"{rate:.3g}")


def place(model: ModelConfig, batch: int, steps: int) -> dict[str, float]:
    """What the rule goes by."""
    tokens = batch * model.context
    return {"width": model.d_model, "batch": tokens, "length": steps * tokens}


def within(what: str, value: float) -> bool:
    """Whether the rule was measured there."""
    _, low, high = RULE[what]
    return low <= value <= high
