"""A stretch of a run that is to be trained again with something changed: what changes, and whether it can be.

Like recorded.py it writes nothing and needs no JAX.
"""

import dataclasses
import json
import math
from pathlib import Path

from core.data.batches import Data, Record, record_of, require_records
from core.errors import UserError
from core.folders import require_new
from core.run.changes import describe
from core.run.other_engine import ENGINE_SETTINGS
from core.run.steering import Record as SteeringRecord
from core.run.steering import overridden
from train_tpu.config import RunConfig
from train_tpu.replay.recorded import Recorded

MARK = "branch.json"
"""In the folder of a branch, what it is: the same command resumes it."""


@dataclasses.dataclass(frozen=True)
class Branch:
    """What is trained again: from `recorded.first` up to `until`, into the new run folder `out`."""

    recorded: Recorded
    until: int
    """Its last update."""
    config: RunConfig
    lr: float | None
    """Its peak learning rate, if that is another than the run's."""
    without: tuple[Record, ...]
    out: Path

    @property
    def changes(self) -> dict[str, object]:
        """The settings that differ from the run's, by name."""
        lr = {} if self.lr is None else {"lr": self.lr}
        return lr | ({"leave_out": list(self.config.leave_out)} if self.without else {})

    @property
    def steering(self) -> list[SteeringRecord]:
        """What was changed while the run trained; a peak learning rate of the branch holds from its first
        update on, whatever the run was steered to."""
        steering = self.recorded.steering
        if self.lr is None or not any(record["command"].startswith("lr=") for record in steering):
            return steering
        return overridden(steering, "lr", self.lr, self.recorded.first)

    @property
    def mark(self) -> str:
        """What tells it from every other branch: the content of `MARK`."""
        run = str(self.recorded.folder.resolve())
        mark = {"run": run, "first": self.recorded.first, "until": self.until, "changes": self.changes}
        return json.dumps(mark, indent=1) + "\n"

    @property
    def begun(self) -> bool:
        """Whether it was begun before, and is to be resumed."""
        try:
            return (self.out / MARK).read_text(encoding="utf-8") == self.mark
        except (OSError, ValueError):
            return False

    def describe(self) -> str:
        """The changes in words."""
        said = []
        if self.lr is not None:
            said.append(f"peak lr {self.lr:g} instead of {peak_of(self.recorded):g}")
        if self.without:
            said.append(f"without the records {', '.join(map(str, self.without))}")
        return " and ".join(said) or "nothing changed"

    def require_read(self, dataset: Data) -> None:
        """Refuses a record to be left out that none of the updates reads: nothing would change."""
        require_records(dataset, self.without, "--without")
        first, cursor, batch = self.recorded.first, self.recorded.cursor, self.config.batch
        missing = set(self.without)
        for index in range(cursor, cursor + (self.until - first + 1) * batch):
            if not missing:
                return
            missing.discard(record_of(dataset, index, self.config.seed))
        if missing:
            raise UserError(
                f"--without {min(missing)}: no batch of the updates {first} to {self.until} holds that record"
            )


def plan_branch(
    recorded: Recorded, until: int, lr: str | None, without: tuple[Record, ...], out: Path
) -> Branch:
    """The branch that is asked for.

    Raises:
        UserError: a value is out of range, the run's settings changed on the way, or something other than
            this branch is at `out` already.
    """
    if not recorded.step <= until < recorded.steps:
        last = recorded.steps - 1
        raise UserError(f"--until {until} is out of range: give an update from {recorded.step} to {last}")
    for change in recorded.changes:
        changed = describe(change.difference, ENGINE_SETTINGS)
        if changed and change.lies_between(recorded.first, until):
            last = change.step - 1
            way = f"--until can go up to {last}" if last >= recorded.step else f"give --step {last} or less"
            raise UserError(
                f"the settings of the run in {recorded.folder} changed {change.where}, and a branch has the "
                f"same ones throughout: {changed}; {way}, or branch from a newer checkpoint"
            )
    old = recorded.config
    was = peak_of(recorded)
    rate = was if lr is None else typed_peak(lr, was)
    changed = rate if rate != was else None
    optim = old.optim if changed is None else dataclasses.replace(old.optim, lr=changed)
    once = {"prompts": (), "eval_tasks": "", "allow_change": (), "from_step": None, "fallback": False}
    config = dataclasses.replace(
        old, **once, out=out, optim=optim, init_from=recorded.source, stop_at=until + 1,
        steps=recorded.steps, epochs=None, leave_out=(*old.leave_out, *without),
    )  # fmt: skip
    branch = Branch(recorded, until, config, changed, without, out)
    if not branch.begun:
        require_new(out)
    return branch


def peak_of(recorded: Recorded) -> float:
    """The run's peak learning rate where a branch begins, as it was steered."""
    return recorded.settings(recorded.first).optim.lr


def typed_peak(given: str, old: float) -> float:
    """A learning rate that is typed as such, or as a factor of the old one."""
    number = given.removesuffix("x")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    value *= old if given.endswith("x") else 1.0
    if not 0 < value < math.inf:
        raise UserError(
            f"--lr is {given!r}; it must be a positive rate such as 3e-4, or a factor such as 0.5x"
        )
    return value
