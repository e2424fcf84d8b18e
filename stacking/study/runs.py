"""The runs of a study: how each is trained, in which folder, and by which jobs."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from core.checkpoint.steps import delete_step, list_steps, step_path
from core.config import ModelConfig
from core.run.folder import lock_folder
from stacking.forks import NEVER, fork, halt_step, in_words, is_finished
from stacking.jobs import Job
from stacking.study.definition import Settings

TRUNK = 10**9
"""Steps of a trunk's schedule: its own decay begins after every branch, also one that a study gets later."""
# What a study does not need of its runs: samples, and checkpoints on the way but against an interruption.
QUIET = {"prompts": (), "sample_every": 0, "save_every": NEVER, "save_minutes": 3, "keep_last": 1}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run: from random parameters, or from a checkpoint of another one."""

    name: str
    """Unique; its folder below the study's."""
    settings: Settings
    """Its own, or those of the run that it comes from."""
    steps: int
    """Updates of its schedule."""
    labels: dict[str, Any]
    """What the report tells it by."""
    source: "Run | None" = None
    at: int = 0
    """Step of the source from which it continues."""
    grow: tuple[str, ...] | None = None
    """Arguments of stacking.grow, where the source is grown."""
    keep: tuple[int, ...] = ()
    """Of a trunk: the steps from which others continue. It is trained no further than the last of them."""

    @property
    def model(self) -> ModelConfig:
        """What it trains."""
        return self.settings.model

    @property
    def ancestry(self) -> "list[Run]":
        """The run, the one that it comes from, and so on."""
        return [self, *(self.source.ancestry if self.source else ())]

    def of_step(self, step: float) -> "Run":
        """The run, or the one that it comes from, whose own update makes a step."""
        return next(one for one in self.ancestry if step > one.at)

    def flops(self, steps: int) -> int:
        """Of all training up to a step, that of the runs it comes from included."""
        if self.source is None or steps <= self.at:
            return self.source.flops(steps) if self.source else steps * self.settings.flops_per_step
        return self.source.flops(self.at) + (steps - self.at) * self.settings.flops_per_step

    @property
    def identity(self) -> dict[str, Any]:
        """What results of a run of this name must have been made with, wherever its text lay."""
        source = {"from": self.source.name, "at": self.at, "grow": self.grow} if self.source else {}
        given = {name: value for name, value in self.settings.given.items() if name != "data"}
        return json.loads(json.dumps({"steps": self.steps, "settings": given, **source}))


class Runs:
    """The runs of a study as jobs."""

    def __init__(
        self,
        out: Path,
        leaves: list[Run],
        ended: Callable[[Run], bool],
        after: Callable[[Run, float], None],
        seconds: Callable[[Run, float], float | None],
    ) -> None:
        """leaves: the runs whose results are wanted, in order. ended: whether they are there already.
        after: called when a run has ended, or a trunk has come to the next checkpoint; with the seconds.
        seconds: what a run is expected to take for FLOPs."""
        self.out, self.leaves = out, leaves
        self._ended, self._after, self._seconds = ended, after, seconds

    def folder(self, run: Run) -> Path:
        """The run folder."""
        return self.out / run.name

    def saved(self, run: Run) -> list[int]:
        """The steps of its checkpoints."""
        return list_steps(self.folder(run) / "checkpoints")

    def is_done(self, run: Run, end: int) -> bool:
        """Whether a run has come to `end` updates."""
        return end in self.saved(run) if run.keep else is_finished(self.folder(run), end)

    def halted_at(self, run: Run, end: int) -> int | None:
        """The step at which its guard ended it, or one that it comes from, before `end`; else None."""
        if self.is_done(run, end):
            return None
        step = halt_step(self.folder(run), end)
        if step is None and run.source is not None and not self.saved(run):
            return self.halted_at(run.source, run.at)
        return step

    def has_halted(self, run: Run, end: int) -> bool:
        """Whether its guard ended it, or one that it comes from, before `end`."""
        return self.halted_at(run, end) is not None

    def _outcome(self, run: Run, end: int) -> str:
        step = self.halted_at(run, end)
        if step is None or (halted := run.of_step(step)) is run:
            return in_words(step)
        return f"not trained, since {halted.name} was {in_words(step)}"

    def jobs(self) -> list[Job]:
        """What must be done for the leaves that have not ended, each after what it needs."""
        return [job for leaf in self.leaves if not self._ended(leaf) for job in self._jobs(leaf, leaf.steps)]

    def _jobs(self, run: Run, end: int) -> list[Job]:
        derives = run.source is not None and not self._can_resume(run, end)
        made = self._jobs(run.source, run.at) if derives else []
        earlier = [step for step in self._wanted(run) if step < end]
        if earlier:  # one process at a time trains a trunk
            made += self._jobs(run, earlier[-1])
        out = self.folder(run)
        if derives and run.grow is not None and not earlier:
            step = step_path(self.folder(run.source) / "checkpoints", run.at)
            made.append(
                Job(
                    name=f"{run.name}@grow",
                    command=("stacking.grow", str(step), *run.grow, "--out", str(out)),
                    done=lambda: self._can_resume(run, end) or self.has_halted(run, end),
                    needs=(made[-1].name,),
                    cost=0,
                    outcome=lambda: self._outcome(run, end),
                    before=lambda: self._go_back(run, end),
                )
            )
        begun = max((run.at, *earlier))
        arguments: tuple[str, ...] = ()
        if run.source is None:
            arguments = run.settings.arguments(**QUIET, steps=run.steps)
        if run.keep:
            arguments += ("--keep-steps", *map(str, run.keep), "--stop-at", str(end))
        made.append(
            Job(
                name=f"{run.name}@{end}",
                command=("train_tpu.run", *arguments, "--out", str(out)),
                done=lambda: (
                    all(self.is_done(run, step) for step in (*earlier, end))
                    or self.has_halted(run, end)
                    or self._ended(run)
                ),
                needs=tuple(job.name for job in made[-1:]),
                cost=run.flops(end) - run.flops(begun),
                before=lambda: self._prepare(run, end),
                after=lambda seconds: self._after(run, seconds),
                outcome=lambda: self._outcome(run, end),
                seconds=lambda: self._seconds(run, self._left(run, begun, end)),
            )
        )
        return made

    def _can_resume(self, run: Run, end: int) -> bool:
        """Whether a run has a checkpoint from which it can come to `end`."""
        return any(step <= end for step in self.saved(run))

    def _left(self, run: Run, begun: int, end: int) -> int:
        """FLOPs of a process that takes a run to `end`, from its newest checkpoint or from `begun`."""
        saved = [step for step in self.saved(run) if begun < step <= end]
        return run.flops(end) - run.flops(max(saved, default=begun))

    def _wanted(self, run: Run) -> list[int]:
        """The steps of a trunk from which something continues that has not ended."""
        found = {
            one.at
            for leaf in self.leaves
            if not self._ended(leaf)
            for one in leaf.ancestry
            if one.source is not None and one.source.name == run.name
        }
        return sorted(found)

    def _prepare(self, run: Run, end: int) -> None:
        """Makes a run's folder one that a process can take to `end`."""
        self._go_back(run, end)
        if run.source is not None and run.grow is None:
            fork(self.folder(run.source), run.at, self.folder(run), {"steps": run.steps})
        if run.source is not None and not self.saved(run):
            raise RuntimeError(f"{run.name} would begin with random parameters instead of {run.source.name}")

    def _go_back(self, run: Run, end: int) -> None:
        """Removes the checkpoints of a run after `end`, as of a trunk that is to branch where it did not; and
        its folder, if nothing is left in it to continue from: without the state that it derives from it
        would begin with random parameters."""
        folder, saved = self.folder(run), self.saved(run)
        beyond = [step for step in saved if step > end]
        nothing = len(beyond) == len(saved)
        if folder.exists() and (beyond or (nothing and run.source is not None)):
            with lock_folder(folder):
                for step in beyond:
                    delete_step(step_path(folder / "checkpoints", step))
                if nothing:
                    shutil.rmtree(folder)

    def remove_weights(self, leaves: list[Run]) -> None:
        """Removes the checkpoints that none of `leaves`, the runs that are or may be wanted, still needs."""
        needed = {run.name for leaf in leaves if not self._ended(leaf) for run in leaf.ancestry}
        trained = {run.name for leaf in self.leaves for run in leaf.ancestry}
        for name in trained - needed:
            self.remove_weights_of(name)

    def remove_weights_of(self, name: str) -> None:
        """Removes the checkpoints of one run."""
        shutil.rmtree(self.out / name / "checkpoints", ignore_errors=True)


def require_names(runs: Collection[Run]) -> None:
    """Our own mistake, where two runs have one name."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise RuntimeError(f"two runs of one name: {sorted(name for name in names if names.count(name) > 1)}")
