"""The learning rate as a function of the step, and whether it would jump where a run is resumed or grown.

A schedule is the optimizer's settings and a number of steps. A run that is resumed or grown under another one
must continue where the first left off: from a decayed state, a rate near the peak undoes the decay, and a
decay that is entered in its middle cuts the training before it short.
"""

import bisect
import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from core import checks
from core.errors import UserError

# What says how the rate runs; its peak does not.
SHAPE = (
    "steps", "schedule", "warmup", "decay", "decay_shape", "final_lr", "schedule_start", "rewarm",
    "rewarm_at",
)  # fmt: skip
JUMP = 0.05  # of the peak: less than one part in twenty is no more than a decay does in a few steps


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and the learning rate's schedule."""

    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: Muon for the layers' weight matrices, AdamW for embeddings, norms, biases and the head.
    adamw: AdamW for everything."""
    lr: float | None = 1e-3  # None, until a run's size and length are known: see core/run/rates.py
    """Peak learning rate. A tuned preset's follows width, batch and length where none is given."""
    adamw_lr_ratio: float = 1.0
    """Muon only: the learning rate of what AdamW updates (embeddings, norms, biases and the head), as a
    multiple of Muon's."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings; norms and biases have none."""
    beta1: float = 0.9
    """AdamW's decay of the mean of the gradients."""
    beta2: float = 0.95
    """AdamW's decay of the mean of their squares."""
    eps: float = 1e-8
    """Added by AdamW to the root of that mean."""
    clip: float = 1.0
    """Clip gradients to this global norm; 0: no clipping."""
    momentum: float = 0.95
    """Momentum of Muon."""
    schedule: Literal["cosine", "wsd"] = "wsd"
    """cosine: cosine decay to the last step. wsd: warmup-stable-decay, constant, then falling over the last
    steps."""
    warmup: int = 200
    """Steps of linear warmup of the learning rate."""
    decay: float = 0.2
    """wsd only: fraction of the steps spent in the final decay."""
    decay_shape: Literal["linear", "1-sqrt"] = "linear"
    """wsd only: how the rate falls there. 1-sqrt: as 1 minus the root of the part of the decay that is done,
    fast at first."""
    final_lr: float = 0.0
    """Learning rate at the end, as a fraction of the peak."""
    schedule_start: int = 0
    """Step at which the schedule begins, with its warmup: the step at which a run is resumed, to train it
    further under a new schedule."""
    rewarm: int = 0
    """Steps of linear warmup back to the schedule's rate, from --rewarm-at on. Growing sets both."""
    rewarm_at: int = 0
    """Step from which the learning rate is warmed up again."""

    def __post_init__(self) -> None:
        checks.positive(**checks.fields(self, "lr", "eps", "adamw_lr_ratio"))
        if self.optimizer == "adamw" and self.adamw_lr_ratio != 1:
            raise UserError(
                "--adamw-lr-ratio is for --optimizer muon: with AdamW alone, all has the rate --lr"
            )
        checks.below_one(**checks.fields(self, "beta1", "beta2", "momentum"))
        checks.fractions(**checks.fields(self, "decay", "final_lr"))
        checks.not_negative(**checks.fields(self, "clip", "weight_decay"))
        checks.counts(0, **checks.fields(self, "warmup", "schedule_start", "rewarm", "rewarm_at"))


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of update `step` (0-based) of `steps`: the schedule's, below it while re-warming."""
    rate = _scheduled(config, step - config.schedule_start, steps - config.schedule_start)
    if step >= config.rewarm_at and config.rewarm:
        rate *= min(1.0, (step - config.rewarm_at + 1) / config.rewarm)
    return rate


def _scheduled(config: OptimizerConfig, step: int, steps: int) -> float:
    """Linear warmup, then cosine, or constant with a decay at the end; steps of the schedule."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    low = config.lr * config.final_lr
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(1, steps - config.warmup)
        return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    decaying = decay_steps(config, steps)
    left = max(0, steps - step)
    if left >= decaying:
        return config.lr
    share = left / decaying if config.decay_shape == "linear" else 1 - math.sqrt(1 - left / decaying)
    return low + (config.lr - low) * share


def decay_steps(config: OptimizerConfig, steps: int) -> int:
    """Steps of the decay at the end of a wsd schedule that is `steps` long."""
    return round(config.decay * steps)


def in_decay(config: OptimizerConfig, step: int, steps: int) -> bool:
    """Whether update `step` lies in the final decay of a wsd schedule that has a stable phase before it."""
    step, steps = step - config.schedule_start, steps - config.schedule_start
    decaying = decay_steps(config, steps)
    stable = config.schedule == "wsd" and config.warmup < steps - decaying
    return stable and steps - step < decaying


def why_not_constant(config: OptimizerConfig, step: int, steps: int) -> str | None:
    """Why the learning rate is not at its constant peak where a run has made `step` updates of `steps`; None
    where it is, as up to the last step before a decay."""
    if config.schedule == "cosine":
        return "its schedule is cosine, which is never constant"
    warm = config.schedule_start + config.warmup
    if config.rewarm and config.rewarm_at <= step:
        warm = max(warm, config.rewarm_at + config.rewarm)
    if step < warm:
        return f"it is warmed up until step {warm}"
    begin = steps - decay_steps(config, steps - config.schedule_start)
    return f"it decays from step {begin} on" if step > begin else None


@dataclasses.dataclass(frozen=True)
class Jump:
    """A learning rate that does not continue where a run is: fractions of the peak."""

    step: int
    before: float
    """Of the last update that was made."""
    after: float
    """Of the next one."""

    def __str__(self) -> str:
        return f"at step {self.step} from {self.before:.3g} to {self.after:.3g} of its peak"


def jump(old: OptimizerConfig, old_steps: int, new: OptimizerConfig, steps: int, step: int) -> Jump | None:
    """How the rate would jump if a run, after `step` updates under `old`, continued under `new`.

    Rates are compared as fractions of their peaks, so that another peak is no jump; with the rate that the
    old schedule had last and the one that it would have had next, so that its own slope is none. A warmup
    that begins just here was asked for by name and is none either, nor is a re-warming, beyond which the
    schedules must agree.
    """
    if step == 0 or (new.schedule_start == step and old.schedule_start != step):
        return None
    rewarms = new.rewarm > 0 and new.rewarm_at == step and (old.rewarm, old.rewarm_at) != (new.rewarm, step)
    if rewarms:
        old, new = (dataclasses.replace(config, rewarm=0) for config in (old, new))
    before, expected = (learning_rate(old, at, old_steps) / old.lr for at in (step - 1, step))
    after = learning_rate(new, step, steps) / new.lr
    if min(before, expected) - JUMP <= after <= max(before, expected) + JUMP:
        return None
    return Jump(step, before, after)


def require_continuous(old: dict[str, Any], new: dict[str, Any], step: int, where: Path) -> None:
    """Refuses to resume a run after `step` updates with settings under which its learning rate would jump.

    Args:
        old: the settings that its checkpoint records, flat, by name.
        new: those of this start.
        where: the run, for the message.

    Raises:
        UserError: says from which rate to which, and the flags that continue without a jump.
    """
    (was, old_steps), (now, steps) = recorded_schedule(old), recorded_schedule(new)
    found = jump(was, old_steps, now, steps, step)
    if found is None or steps <= step:  # too few steps are refused as such
        return
    flat = {"steps": old_steps} | dataclasses.asdict(was)
    changed = [name for name in SHAPE if flat[name] != new.get(name, flat[name])]
    given = flags({name: new[name] for name in changed})
    if (
        changed == ["steps"]
        and was.schedule == "wsd"
        and jump(was, old_steps, now, 2 * old_steps, step) is None
    ):
        fewest = fewest_steps(was, old_steps, now, step)  # the decay has not begun, and would with fewer
        way = f"give --steps {fewest} or more with --allow-change steps"
    else:
        restarted = {name: new[name] for name in changed} | {"schedule_start": step}
        if now.warmup == 0:
            restarted["warmup"] = max(1, (steps - step) // 10)
        way = f"start a new schedule here with {flags(restarted)} --allow-change {' '.join(restarted)}"
    raise UserError(
        f"with {given} the learning rate of {where} would jump {found}: {way}, or resume the run without "
        f"{given}"
    )


def flags(settings: dict[str, Any]) -> str:
    """Settings as they are typed."""
    return " ".join(f"{checks.option(name)} {value}" for name, value in settings.items())


def fewest_steps(old: OptimizerConfig, old_steps: int, new: OptimizerConfig, step: int) -> int:
    """The fewest steps with which `new` continues without a jump after `step` updates of a wsd schedule whose
    decay has not begun."""
    counts = range(step + 1, 2 * old_steps)
    return counts[bisect.bisect_left(counts, True, key=lambda n: jump(old, old_steps, new, n, step) is None)]


def check_room(config: OptimizerConfig, steps: int) -> str | None:
    """A warning about a warmup that leaves no room for the rest of the schedule; None if there is room."""
    length = steps - config.schedule_start
    decaying = decay_steps(config, length) if config.schedule == "wsd" else 0
    if config.warmup < length and config.warmup <= length - decaying:
        return None
    if config.warmup >= length:
        reached = learning_rate(config, steps - 1, steps) / config.lr
        return (
            f"--warmup {config.warmup} is not shorter than the {length} steps: the learning rate ends at "
            f"{reached:.2g} of its peak and never decays"
        )
    return (
        f"--warmup {config.warmup} reaches into the decay, the last {decaying} of {length} steps: the "
        "learning rate drops as soon as it has reached its peak"
    )


def recorded_schedule(run: dict[str, Any]) -> tuple[OptimizerConfig, int]:
    """The schedule of a recorded run; what the record lacks, since it is older, has its default."""
    names = {field.name for field in dataclasses.fields(OptimizerConfig)}
    return OptimizerConfig(**{name: run[name] for name in names & set(run)}), run["steps"]
