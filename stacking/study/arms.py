"""The arms of a study: their folders, the jobs that train them, and the results in their logs."""

import dataclasses
import itertools
from pathlib import Path

from core.checkpoint.steps import list_steps, step_path
from core.errors import UserError
from core.run.log import CARRIED, read_log
from stacking.forks import NEVER, fork, is_finished, is_halted
from stacking.jobs import Job
from stacking.study.config import StudyConfig, Target
from stacking.study.results import Arm, Point


@dataclasses.dataclass(frozen=True)
class ArmKey:
    """One arm: how it grew, when, with which seed and learning rate."""

    op: str
    grown_at: int
    """Step; 0 for scratch."""
    seed: int
    lr: float

    @property
    def name(self) -> str:
        """As in tables and folder names: scratch, stack-at-250."""
        return self.op if self.op == "scratch" else f"{self.op}-at-{self.grown_at}"


class Study:
    """The jobs of a study and the folders of its arms."""

    def __init__(self, config: StudyConfig, target: Target) -> None:
        self.config, self.target = config, target
        self.grow_steps = tuple(round(f * target.steps) for f in config.fractions)
        self._longest = max(max(self.lengths(at)) for at in (0, *self.grow_steps))

    def lengths(self, grown_at: int) -> tuple[int, ...]:
        """Steps of an arm's decayed runs: early, at equal tokens, and at scratch's FLOPs if that differs."""
        t = self.target
        base, whole = (m.flops_per_token() for m in (t.base, t.model))
        equal_flops = t.steps + round(grown_at * (1 - base / whole))
        return tuple(sorted({round(self.config.early * t.steps), t.steps, equal_flops}))

    def keys(self, seed: int, lrs: dict[str, float] | float) -> list[ArmKey]:
        """All arms of a seed, at one learning rate or each at its own."""

        def key(op: str, at: int) -> ArmKey:
            arm = ArmKey(op, at, seed, 0.0)
            return dataclasses.replace(arm, lr=lrs[arm.name] if isinstance(lrs, dict) else lrs)

        return [key("scratch", 0), *(key(op, at) for at in self.grow_steps for op in self.config.ops)]

    def folder(self, key: ArmKey) -> Path:
        """An arm's folder, with its trunk/ and its decayed runs."""
        return self.config.out / f"seed-{key.seed}" / f"lr-{key.lr:g}" / key.name

    def jobs(self, key: ArmKey, lengths: tuple[int, ...]) -> list[Job]:
        """What has to be done for an arm's decayed runs of these lengths, in order."""
        starts = tuple(self.target.decay_start(n) for n in lengths)
        trunk, made = self.folder(key) / "trunk", []
        more: tuple[str, ...] = ()
        if key.op == "scratch":
            more = self._train_arguments(key)
        else:
            made = self._grown(key, trunk)
        # All forks that the study will ever make are kept: tuning goes before, with one length only.
        forks = sorted({self.target.decay_start(n) for n in self.lengths(key.grown_at)})
        kept = ("--keep-steps", *map(str, forks), "--stop-at", str(max(starts)))
        made.append(
            Job(
                name=self._name(trunk),
                command=("train_tpu.run", *more, "--out", str(trunk), *kept),
                done=lambda: (
                    max(starts) in list_steps(trunk / "checkpoints") or self.has_halted(key, max(starts))
                ),
                needs=tuple(job.name for job in made[-1:]),
                cost=self.target.flops(max(starts), key.grown_at)
                - self.target.flops(key.grown_at, key.grown_at),
            )
        )
        for steps, start in zip(lengths, starts, strict=True):
            out = self.decayed(key, steps)
            made.append(
                Job(
                    name=self._name(out),
                    command=("train_tpu.run", "--out", str(out)),
                    done=lambda out=out, steps=steps, start=start: (
                        is_finished(out, steps) or is_halted(out) or self.has_halted(key, start)
                    ),
                    needs=(self._name(trunk),),
                    cost=self.target.flops(steps, 0) - self.target.flops(start, 0),
                    before=lambda out=out, steps=steps, start=start: fork(
                        trunk, start, out, {"steps": steps}
                    ),
                )
            )
        return made

    def decayed(self, key: ArmKey, steps: int) -> Path:
        """The folder of an arm's decayed run."""
        return self.folder(key) / f"decayed-{steps}"

    def base(self, key: ArmKey) -> Path:
        """The folder of the base, which all arms of a seed and rate share."""
        return self.config.out / f"seed-{key.seed}" / f"lr-{key.lr:g}" / "base"

    def has_halted(self, key: ArmKey, step: int) -> bool:
        """Whether the guard ended an arm's trunk, or its base before the growth, before `step` was kept."""
        trunk = self.folder(key) / "trunk"
        if step in list_steps(trunk / "checkpoints"):
            return False
        base = self.base(key)
        lacks_source = key.op != "scratch" and key.grown_at not in list_steps(base / "checkpoints")
        return is_halted(trunk) or (lacks_source and is_halted(base))

    def result(self, key: ArmKey, lengths: tuple[int, ...]) -> Arm | None:
        """What an arm's logs say of the decayed runs that are finished; None where that at equal tokens is
        still to be done."""
        lengths = tuple(steps for steps in lengths if is_finished(self.decayed(key, steps), steps))
        whole = self.target.steps
        if whole not in lengths:
            start = self.target.decay_start(whole)
            halted = is_halted(self.decayed(key, whole)) or self.has_halted(key, start)
            return Arm(key.op, key.grown_at, key.seed, key.lr, (), (), halted=True) if halted else None
        tokens = self.target.run.batch * self.target.model.context

        def point(row_steps: int, rows: list[dict]) -> Point:
            losses = {row["split"]: float(row["nll"]) for row in rows}  # "nan" where it is not finite
            return Point(row_steps, row_steps * tokens, self.target.flops(row_steps, key.grown_at), losses)

        decayed = []
        for steps in lengths:
            folder = self.decayed(key, steps)
            rows = [row for row in read_log(folder, "eval") if row["step"] == steps]
            if not rows:
                raise UserError(
                    f"the log of {folder} lacks its last evaluation: remove that folder and give the same "
                    "command again"
                )
            decayed.append(point(steps, rows))
        rows = read_log(self.folder(key) / "trunk", "eval")
        groups = itertools.groupby(rows, lambda row: (row["step"], CARRIED in row))
        trunk = [point(step, list(rows)) for (step, _), rows in groups]
        return Arm(key.op, key.grown_at, key.seed, key.lr, tuple(trunk), tuple(decayed))

    def _grown(self, key: ArmKey, trunk: Path) -> list[Job]:
        """The base and the growth."""
        base = self.base(key)
        last = max(self.grow_steps)
        kept = ("--keep-steps", *map(str, self.grow_steps), "--stop-at", str(last))
        layers = ("--n-layers", str(self.target.base.n_layers))
        train_base = Job(
            name=self._name(base),
            command=("train_tpu.run", *self._train_arguments(key), *layers, "--out", str(base), *kept),
            done=lambda: last in list_steps(base / "checkpoints") or is_halted(base),
            needs=(),
            cost=self.target.flops(last, last),
        )
        step = step_path(base / "checkpoints", key.grown_at)
        how = ("--op", key.op, "--factor", str(self.config.factor), "--schedule", self.config.schedule)
        grow = Job(
            name=self._name(trunk.with_name("grow")),
            command=("stacking.grow", str(step), *how, "--out", str(trunk)),
            done=lambda: trunk.exists() or self.has_halted(key, key.grown_at),
            needs=(train_base.name,),
            cost=0,
        )
        return [train_base, grow]

    def _train_arguments(self, key: ArmKey) -> tuple[str, ...]:
        """A trunk: a schedule so long that its decay begins after the last fork."""
        steps = self.target.steps
        rare = {"--eval-every": max(1, steps // 20), "--log-every": max(1, steps // 10)}
        quiet = ("--prompts", *(str(word) for pair in rare.items() for word in pair))
        forced = (
            "--seed", str(key.seed), "--lr", repr(key.lr), "--steps", str(2 * self._longest),
            "--save-every", str(NEVER), "--keep-last", "1",
        )  # fmt: skip
        return (*quiet, *self.target.arguments, *forced)

    def _name(self, folder: Path) -> str:
        return str(folder.relative_to(self.config.out))
