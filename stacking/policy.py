"""How training goes on behind a growth: the schedule, and which policies do not go together."""

import dataclasses
from typing import Literal

from core.errors import UserError
from train_tpu.config import RunConfig
from train_tpu.optimizer import learning_rate

REWARM = 200  # steps, where nothing is said and enough of them are left


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What becomes of the learning rate's course."""

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
                f"--schedule {text}: only {steps_left} steps are left: give fewer, or more --steps"
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
            f"--optimizer reset with --schedule {schedule.kind} makes updates of full size out of single "
            "gradients: give --schedule rewarm or a restart with a warmup, or --force if that is meant"
        )


def continue_schedule(
    run: RunConfig, step: int, schedule: Schedule, steps: int | None, where: str
) -> RunConfig:
    """The settings under which a run grown at `step` goes on.

    What goes on must be the schedule that ran until here: if another number of steps would have had another
    learning rate before `step`, the rate would jump.

    Args:
        steps: updates in all; None: as the run had.
        where: the run's name for messages.

    Raises:
        UserError: the schedule has ended, or would jump.
    """
    if run.steps is None:
        raise AssertionError("a saved run has a number of steps")
    total = steps or run.steps
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
    for past in range(step):
        old, new = learning_rate(optim, past, run.steps), learning_rate(optim, past, total)
        if old != new:
            raise UserError(
                f"{where} was trained for {run.steps} steps, and at step {past} its learning rate was "
                f"{old:.3g} where {total} steps have {new:.3g}: {remedy}"
            )
    if schedule.kind == "rewarm":
        optim = dataclasses.replace(optim, rewarm=schedule.rewarm, rewarm_at=step)
    return dataclasses.replace(run, steps=total, optim=optim)


def describe_schedule(run: RunConfig) -> str:
    """A run's schedule in a few words."""
    optim = run.optim
    words = [f"{optim.schedule} of {run.steps - optim.schedule_start:,} steps"]
    if optim.schedule_start:
        words.append(f"begun at step {optim.schedule_start:,}")
    if optim.schedule == "wsd" and optim.decay:
        words.append(f"decays in the last {optim.decay:.0%}")
    if optim.rewarm:
        words.append(f"re-warms from step {optim.rewarm_at:,} to {optim.rewarm_at + optim.rewarm:,}")
    return ", ".join(words)
