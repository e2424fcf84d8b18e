"""Steering: what may be changed while a run trains, as data, and what that makes of the run's settings.

A steered run records (step, command) of whatever changes its losses. The settings of an update are a pure
function of the run's own settings and that record (`steered`), for the loop, a resumed run and a replay
alike.
"""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

from core.checks import MAX_COUNT
from core.errors import UserError
from core.run.guard import GuardConfig
from core.run.schedule import OptimizerConfig, flags, jump, learning_rate

RECORD = "steering.json"  # in the run folder
SETTINGS = {"lr": "lr", "guard.sigma": "sigma", "guard.halt_after": "halt_after"}
"""Commands that give a setting another value from a step on -> the setting's name in config.json."""
LASTING = (*SETTINGS, "skip", "steps")
"""Commands that are recorded: they change the run. The others are only logged."""
ACTIONS = ("save", "evaluate", "sample", "pause", "continue", "stop")
COMMANDS = 'lr=0.5x, lr=3e-4, guard.sigma=5, guard.halt_after=20, skip=1200:1260, steps=+2000, save, evaluate, sample "PROMPT", pause, continue, stop'  # noqa: E501

LR_FACTORS = (0.01, 100.0)
MOST_LR = 1.0
"""Of what is typed: beyond are slips of the finger."""
_NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"


class Record(TypedDict):
    """One entry of a run's steering: in steering.json of its folder and in the manifests of checkpoints."""

    step: int
    """The first update it holds for."""
    command: str


class Command(NamedTuple):
    """What was typed: `lr=0.5x` is ("lr", "0.5x"), `save` ("save", "")."""

    name: str
    value: str = ""

    def __str__(self) -> str:
        if self.name in ACTIONS:
            return shlex.join([self.name, self.value]) if self.value else self.name
        return f"{self.name}={self.value}"


@dataclasses.dataclass(frozen=True)
class Steered:
    """The settings of a run's updates that steering changes."""

    optim: OptimizerConfig
    guard: GuardConfig
    steps: int
    skips: tuple[tuple[int, int], ...] = ()
    """(A, B): updates A to B - 1 are left out."""

    def lr(self, step: int) -> float:
        """The learning rate of update `step`."""
        return learning_rate(self.optim, step, self.steps)

    def leaves_out(self, step: int) -> bool:
        """Whether update `step` is left out: its batch is read past, and nothing is learned."""
        return any(begin <= step < end for begin, end in self.skips)


def steered(start: Steered, records: Sequence[Record], step: int) -> Steered:
    """The settings of update `step` of a run that began with those of `start`.

    `steps` is not taken from the record: it is a setting of the whole run, which config.json has, and no
    update that was made would have had another learning rate under it (`settle`).
    """
    now = start
    for record in records:
        (command,) = parse(shlex.split(record["command"]))
        if record["step"] <= step and command.name != "steps":
            now = apply(now, command)
    return now


def steered_length(records: Sequence[Record], since: int) -> int | None:
    """The number of all steps that a run was steered to last, at step `since` or later; None: it was not."""
    commands = [parse(shlex.split(record["command"]))[0] for record in records if record["step"] >= since]
    return next((int(command.value) for command in reversed(commands) if command.name == "steps"), None)


def apply(now: Steered, command: Command) -> Steered:
    """The settings after a command, as `settle` gives it."""
    value = command.value
    if command.name == "lr":
        lr = now.optim.lr * float(value[:-1]) if value.endswith("x") else float(value)
        return dataclasses.replace(now, optim=dataclasses.replace(now.optim, lr=lr))
    if command.name == "skip":
        return dataclasses.replace(now, skips=(*now.skips, _range(value)))
    if command.name == "steps":
        return dataclasses.replace(now, steps=int(value))
    if command.name in SETTINGS:
        number = float(value) if command.name == "guard.sigma" else int(value)
        return dataclasses.replace(
            now, guard=dataclasses.replace(now.guard, **{SETTINGS[command.name]: number})
        )
    return now


def parse(words: Sequence[str]) -> list[Command]:
    """Commands as they are typed.

    Raises:
        UserError: one is unknown, or its value is out of range; the range is named.
    """
    commands, left = [], list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if word == "sample":
            if not left:
                raise UserError('sample needs a prompt: sample "The"')
            commands.append(Command(word, left.pop(0)))
        elif word in ACTIONS:
            commands.append(Command(word))
        elif equals and name in LASTING:
            _check_value(name, value)
            commands.append(Command(name, value))
        else:
            raise UserError(f"{word!r} is not a command that steers a run: give {COMMANDS}")
    return commands


def _check_value(name: str, value: str) -> None:
    def refuse(rule: str) -> None:
        raise UserError(f"{name}={value}: {rule}")

    if name == "lr":
        number = re.fullmatch(_NUMBER, value.removesuffix("x"))
        least, most = LR_FACTORS if value.endswith("x") else (0.0, MOST_LR)
        if not number or not least <= float(number[0]) <= most or float(number[0]) == 0:
            refuse(
                "give a factor from {:g}x to {:g}x, such as lr=0.5x, or a peak learning rate above 0 and at "
                "most {:g}, such as lr=3e-4".format(*LR_FACTORS, MOST_LR)
            )
    elif name == "guard.sigma":
        if not re.fullmatch(_NUMBER, value) or not 0 <= float(value) < float("inf"):
            refuse("give a number of standard deviations, 0 or more (0 skips only what is not finite)")
    elif name == "guard.halt_after":
        if not re.fullmatch(r"\d+", value) or not 1 <= int(value) <= MAX_COUNT:
            refuse(f"give an integer from 1 to {MAX_COUNT:,}")
    elif name == "skip":
        if not re.fullmatch(r"\d+:\d+", value) or not _range(value)[0] < _range(value)[1] <= MAX_COUNT:
            refuse("give the first update to leave out and the one after the last, as in skip=1200:1260")
    elif not re.fullmatch(r"[+-]?\d+", value) or not 1 <= abs(int(value)) <= MAX_COUNT:
        refuse("give a change such as steps=+2000, or a number of all steps such as steps=12000")


def _range(value: str) -> tuple[int, int]:
    begin, _, end = value.partition(":")
    return int(begin), int(end)


def settle(command: Command, now: Steered, step: int) -> Command:
    """The command as it is recorded when it is applied before update `step`: `steps=+2000` with the sum.

    Args:
        now: the settings so far.

    Raises:
        UserError: it cannot be applied here.
    """
    if command.name == "skip":
        begin, end = _range(command.value)
        if begin < step:
            raise UserError(f"{command}: the run is at step {step} already: give a range from there on")
        if end > now.steps:
            raise UserError(f"{command}: the run ends at step {now.steps}: give a range up to there")
    if command.name != "steps":
        return command
    relative = command.value[0] in "+-"
    steps = int(command.value) + (now.steps if relative else 0)
    if not step < steps <= MAX_COUNT:
        raise UserError(f"{command} makes {steps} steps: give more than the {step} that the run has made")
    if now.lr(step) != learning_rate(now.optim, step, steps):
        raise UserError(f"{command} would make the learning rate jump {_jump(now, steps, step)}")
    return Command("steps", str(steps))


def _jump(now: Steered, steps: int, step: int) -> str:
    """From where to where, and the way to train on without."""
    found = jump(now.optim, now.steps, now.optim, steps, step)
    how = found or f"at step {step} from {now.lr(step):.4g} to {learning_rate(now.optim, step, steps):.4g}"
    warmup = max(1, abs(steps - step) // 10)
    new = {"steps": steps, "schedule_start": step, "warmup": warmup}
    return (
        f"{how}, for the schedule decays there: stop the run and resume it with a new schedule, "
        f"{flags(new)} --allow-change {' '.join(new)}"
    )


def resumed(
    saved: Sequence[Record],
    kept: Sequence[Record] | None,
    old: dict[str, Any],
    new: dict[str, Any],
    step: int,
) -> list[Record]:
    """The record with which a run resumes at `step`: what comes at later steps is applied there again.

    A setting that this start changes by name (--allow-change lr) holds from here on, whatever was steered.

    Args:
        saved: what the checkpoint's manifest records.
        kept: what the run's folder does, beyond it; None for a resume that goes back on purpose.
        old, new: the settings of the checkpoint and of this start, flat.
    """
    records = list(saved if kept is None else kept)
    for name, setting in SETTINGS.items():
        ours = [record for record in records if record["command"].startswith(f"{name}=")]
        if ours and setting in old and old[setting] != new[setting]:
            records = overridden(records, name, new[setting], step)
    return records


def overridden(records: Sequence[Record], name: str, value: Any, step: int) -> list[Record]:
    """The record in which a setting of `SETTINGS` has a value from update `step` on, whatever was steered."""
    before = [record for record in records if record["step"] < step]
    later = [record for record in records if record["step"] >= step]
    others = [record for record in later if not record["command"].startswith(f"{name}=")]
    return [*before, Record(step=step, command=f"{name}={value}"), *others]
