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
    "tokens per update": (0.51, 2**16, 2**17),
    "tokens": (-0.46, 65.0e6, 261.1e6),
}


def with_rate(config: Any, model: ModelConfig, steps: int) -> tuple[Any, list[tuple[str, str]]]:
    """The settings of a run of `steps` updates with a peak rate; and for its table, where that is not the
    preset's, how it came to be."""
    if config.optim.lr is not None:
        return config, []
    name, optimizer = config.preset, config.optim.optimizer
    lr = peak_rate(name, optimizer, model, config.batch, steps)
    rows, of_preset = [], preset_rate(name, optimizer)
    if lr != of_preset:
        tokens = steps * config.batch * model.context
        update = f"{config.batch} x {model.context} per update"
        how = f"width {model.d_model}, {update}, {tokens:,} tokens"
        rows.append(("learning rate", f"the preset's {of_preset:g}, by a rule for {how}: {lr:g}"))
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=lr)), rows


def preset_rate(name: str, optimizer: str) -> float:
    """The preset's own."""
    return TRAINING_DEFAULTS[name]["lr" if optimizer == "muon" else "adamw_lr"]


def has_rule(name: str, optimizer: str) -> bool:
    """Whether the preset's rate was tuned, at a length from which the rule leads to others."""
    return optimizer == "muon" and "tokens" in TRAINING_DEFAULTS[name]


def peak_rate(name: str, optimizer: str, model: ModelConfig, batch: int, steps: int) -> float:
    """The rate, to three digits, for updates of `batch` sequences."""
    rate = preset_rate(name, optimizer)
    if not has_rule(name, optimizer):
        return rate
    given, own = TRAINING_DEFAULTS[name], preset(name)
    here = (model.d_model, batch * model.context, steps * batch * model.context)
    tuned = (own.d_model, given["batch"] * own.context, given["tokens"])
    for (power, low, high), now, then in zip(RULE.values(), here, tuned, strict=True):
        rate *= (min(max(now, low), high) / min(max(then, low), high)) ** power
    return float(f"{rate:.3g}")
