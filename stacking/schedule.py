"""How training continues after a growth: the schedule, and what does not go with a reset optimizer."""

import dataclasses
from typing import Literal

from core.errors import UserError
from core.run.schedule import in_decay, jump
from train_tpu.config import RunConfig

REWARM = 200  # steps, where nothing is said and enough of them are left


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What becomes of the learning rate's schedule."""

    kind: Literal["rewarm", "keep", "restart"]
    rewarm: int = 0
    """Steps of re-warming; 0 for the other kinds."""


def parse_schedule(text: str, steps_left: int) -> Schedule:
    """`rewarm`, `rewarm:N`, `keep` or `restart`; a `UserError` for anything else, or an N beyond the end."""
    kind, _, number = text.partition(":")
    if kind == "rewarm" and (not number or number.isdecimal()):
        n = int(number) if number else min(REWARM, max(1, steps_left // 4))
        if n == 0:
            raise UserError("--schedule rewarm:0 does not re-warm: give a number of steps, or keep")
        if n > steps_left > 0:
            raise UserError(
                f"--schedule {text}: only {steps_left} steps are left: give at most rewarm:{steps_left}"
            )
        return Schedule("rewarm", n)
    if text in ("keep", "restart"):
        return Schedule(text)
    raise UserError(
        f"--schedule {text!r} is not known: give rewarm, rewarm:N (a number of steps), keep or restart"
    )


def require_safe(optimizer: Literal["copy", "reset"], schedule: Schedule, warmup: int, force: bool) -> None:
    """Refuses a reset optimizer under a learning rate that does not start low.

    From empty moments Adam's first update has the size of the learning rate in every element, whatever the
    gradient, which is noise at that point: that is what warmup is for.
    """
    starts_low = schedule.kind == "rewarm" or (schedule.kind == "restart" and warmup > 0)
    if optimizer == "reset" and not starts_low and not force:
        raise UserError(
            f"--optimizer reset with --schedule {schedule.kind} makes full-size updates from single "
            "gradients: give --schedule rewarm or a restart with a warmup, or --force if that is meant"
        )


def continue_schedule(
    run: RunConfig, step: int, schedule: Schedule, steps: int | None, where: str
) -> RunConfig:
    """The settings under which a run grown at `step` is trained on.

    The learning rate must not jump (core.run.schedule), and a re-warming must not raise it out of a decay.

    Args:
        steps: updates in all; None: as the run had.
        where: the run's name for messages.

    Raises:
        UserError: the schedule has ended, or would jump.
    """
    total = run.steps if steps is None else steps
    optim = run.optim
    if schedule.kind == "restart":
        if total <= step:
            raise UserError(
                f"{where} is at step {step} of {total}, so a restarted schedule has no steps to run: "
                "give more --steps"
            )
        optim = dataclasses.replace(optim, schedule_start=step, rewarm=0, rewarm_at=0)
        return dataclasses.replace(run, steps=total, optim=optim)
    remedy = (
        "grow a step before its decay (train_tpu.run keeps one with --keep-steps, or stops there with "
        "--stop-at), or give --schedule restart and more --steps"
    )
    if total <= step:
        raise UserError(f"the schedule of {where} has ended (step {step} of {total}): {remedy}")
    grown = optim
    if schedule.kind == "rewarm":
        grown = dataclasses.replace(optim, rewarm=schedule.rewarm, rewarm_at=step)
    found = jump(optim, run.steps, grown, total, step)
    if found is not None:
        raise UserError(
            f"{where} was trained for {run.steps} steps; with {total} its learning rate would jump {found}: "
            f"{remedy}"
        )
    if schedule.kind == "rewarm" and in_decay(optim, step, run.steps):
        raise UserError(
            f"{where} is in its final decay (step {step} of {run.steps}), and re-warming would raise the "
            f"learning rate again: {remedy}, or --schedule keep to finish the decay"
        )
    return dataclasses.replace(run, steps=total, optim=grown)


def describe_schedule(run: RunConfig) -> str:
    """A run's schedule in a few words."""
    optim = run.optim
    words = [f"{optim.schedule} of {run.steps - optim.schedule_start:,} steps"]
    if optim.schedule_start:
        words.append(f"begun at step {optim.schedule_start:,}")
    if optim.schedule == "wsd" and optim.decay:
        how = "" if optim.decay_shape == "linear" else f" as {optim.decay_shape}"
        words.append(f"decays in the last {optim.decay:.0%}{how}")
    if optim.rewarm:
        words.append(f"re-warms from step {optim.rewarm_at:,} to {optim.rewarm_at + optim.rewarm:,}")
    return ", ".join(words)
