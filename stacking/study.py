"""`python -m stacking.study`: does growing pay? Growth against training from scratch, fairly.

    python -m stacking.study --out studies/mine -- --preset mtlm1-88m --data DATA --steps 2000 ...

What stands behind the second -- is the target model's training run, as `train_tpu.run` takes it. The arms:

    scratch      the target from the first step on
    OP at f      a base of fewer layers trained for the fraction f of the steps, grown by OP, trained on

Fair means: all arms of a seed see the same sequences in the same order. Every arm is a trunk at a constant
learning rate, and what is compared are decays forked off it, since an undecayed loss says little about the
decayed one. All arms are tuned over the same learning rates. The base's FLOPs count. Every arm is decayed at
three lengths: at equal tokens, at equal FLOPs, and earlier, so that the FLOPs to reach scratch's loss can be
read off without extrapolating. Seeds are paired, and their spread stands beside every number.

Each arm is a `train_tpu.run` in a process of its own; whatever is there already is not done again.
"""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import jax
import tyro

from core.config import ModelConfig
from core.errors import UserError, run_command
from core.steps import list_steps, step_path
from stacking.jobs import Job, run_jobs
from stacking.plan import Operator, make_plan
from stacking.policy import parse_schedule
from stacking.report import Arm, Point, write_report
from train_tpu import config as settings
from train_tpu import run as train
from train_tpu.config import RunConfig
from train_tpu.loop import END
from train_tpu.metrics import read_log
from train_tpu.prepare import CACHE, open_or_prepare
from train_tpu.progress import make_console
from train_tpu.run_folder import read_config, write_config

NEVER = 10**9  # steps between checkpoints of an arm: those that are needed are named one by one


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Compare growing with training from scratch. Behind -- follow the arguments of the target's
    train_tpu.run, --steps among them: the updates that scratch gets."""

    out: Path
    """The study's folder. The same command goes on with what is missing."""
    ops: tuple[Operator, ...] = ("stack", "interleave", "identity", "random")
    """Ways of growing; random is the control."""
    fractions: tuple[float, ...] = (0.25, 0.5)
    """When to grow: parts of the target's steps that the base is trained for."""
    factor: float = 2.0
    """Layers of the target / layers of the base."""
    schedule: str = "rewarm:50"
    """As stacking.grow takes it."""
    seeds: tuple[int, ...] = (0, 1)
    lrs: tuple[float, ...] = ()
    """Peak learning rates that every arm is tuned over, on the first seed, by its decayed loss at equal
    tokens. Default: the run's own, untuned."""
    early: float = 0.8
    """Length of the shortest decayed run, as a part of the steps."""
    heldout: str | None = None
    """The held-out set that losses are of. Default: the data's first."""
    jobs: int = 1
    """Arms trained at the same time, on each GPU if there are any."""
    gpus: tuple[int, ...] = ()
    """Numbers of the GPUs to spread the arms over. Default: every arm sees all devices there are."""
    dry_run: bool = False
    """List the arms and what they cost, and train nothing."""
    report: bool = False
    """Train nothing: table and plot of the arms that are there already."""

    def __post_init__(self) -> None:
        if not self.seeds or not self.ops or not self.fractions:
            raise UserError("a study needs a seed, an operator and a fraction at least")
        if self.jobs < 1:
            raise UserError(f"--jobs is {self.jobs}; it must be at least 1")
        for name, values in (("fractions", self.fractions), ("early", (self.early,))):
            for value in values:
                if not 0 < value < 1:
                    raise UserError(
                        f"--{name} {value:g} is not a part of the steps: give one between 0 and 1"
                    )
        if any(lr <= 0 for lr in self.lrs):
            raise UserError(f"--lrs {min(self.lrs):g} is no learning rate: give positive ones")


@dataclasses.dataclass(frozen=True)
class Target:
    """The run that the arms are measured against, and the base below it."""

    arguments: tuple[str, ...]
    run: RunConfig
    steps: int
    model: ModelConfig
    base: ModelConfig

    def decay_start(self, steps: int) -> int:
        """The last step at which a schedule of `steps` has the constant rate."""
        return steps - round(self.run.optim.decay * steps)

    def flops(self, steps: int, grown_at: int) -> int:
        """Training FLOPs of `steps` updates, the first `grown_at` of them with the base."""
        base, whole = (m.flops_per_token() for m in (self.base, self.model))
        tokens = self.run.batch * self.model.context
        return tokens * (min(steps, grown_at) * base + max(0, steps - grown_at) * whole)


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
    """Which jobs a study is made of, and where their folders lie."""

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
        """Where an arm lies: its trunk/ and its decayed runs."""
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
                done=lambda: max(starts) in list_steps(trunk / "checkpoints"),
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
                    done=lambda out=out, steps=steps: is_finished(out, steps),
                    needs=(self._name(trunk),),
                    cost=self.target.flops(steps, 0) - self.target.flops(start, 0),
                    before=lambda out=out, steps=steps, start=start: fork(trunk, start, out, steps),
                )
            )
        return made

    def decayed(self, key: ArmKey, steps: int) -> Path:
        """The folder of an arm's decayed run."""
        return self.folder(key) / f"decayed-{steps}"

    def result(self, key: ArmKey, lengths: tuple[int, ...]) -> Arm | None:
        """What an arm's logs say of the decayed runs that are finished; None without that at equal tokens."""
        lengths = tuple(steps for steps in lengths if is_finished(self.decayed(key, steps), steps))
        if self.target.steps not in lengths:
            return None
        tokens = self.target.run.batch * self.target.model.context

        def point(row_steps: int, rows: list[dict]) -> Point:
            losses = {row["split"]: row["nll"] for row in rows}
            return Point(row_steps, row_steps * tokens, self.target.flops(row_steps, key.grown_at), losses)

        decayed = []
        for steps in lengths:
            rows = [row for row in read_log(self.decayed(key, steps), "eval") if row["step"] == steps]
            decayed.append(point(steps, rows))
        rows = read_log(self.folder(key) / "trunk", "eval")
        groups = itertools.groupby(rows, lambda row: (row["step"], "before_growth" in row))
        trunk = [point(step, list(rows)) for (step, _), rows in groups]
        return Arm(key.op, key.grown_at, key.seed, key.lr, tuple(trunk), tuple(decayed))

    def _grown(self, key: ArmKey, trunk: Path) -> list[Job]:
        """The base, which all arms of a seed and rate share, and the growth."""
        base = self.config.out / f"seed-{key.seed}" / f"lr-{key.lr:g}" / "base"
        last = max(self.grow_steps)
        kept = ("--keep-steps", *map(str, self.grow_steps), "--stop-at", str(last))
        layers = ("--n-layers", str(self.target.base.n_layers))
        train_base = Job(
            name=self._name(base),
            command=("train_tpu.run", *self._train_arguments(key), *layers, "--out", str(base), *kept),
            done=lambda: last in list_steps(base / "checkpoints"),
            needs=(),
            cost=self.target.flops(last, last),
        )
        step = step_path(base / "checkpoints", key.grown_at)
        how = ("--op", key.op, "--factor", str(self.config.factor), "--schedule", self.config.schedule)
        grow = Job(
            name=self._name(trunk.with_name("grow")),
            command=("stacking.grow", str(step), *how, "--out", str(trunk)),
            done=trunk.exists,
            needs=(train_base.name,),
            cost=0,
        )
        return [train_base, grow]

    def _train_arguments(self, key: ArmKey) -> tuple[str, ...]:
        """A trunk: a schedule so long that its decay begins behind the last fork."""
        steps = self.target.steps
        quiet = (
            "--eval-every",
            str(max(1, steps // 20)),
            "--prompts",
            "--log-every",
            str(max(1, steps // 10)),
        )
        forced = (
            "--seed", str(key.seed), "--lr", repr(key.lr), "--steps", str(2 * self._longest),
            "--save-every", str(NEVER), "--keep-last", "1",
        )  # fmt: skip
        return (*quiet, *self.target.arguments, *forced)

    def _name(self, folder: Path) -> str:
        return str(folder.relative_to(self.config.out))


def open_target(config: StudyConfig, arguments: tuple[str, ...]) -> Target:
    """The target's run out of its arguments, with its data prepared and its sizes known."""
    run = train.parse(list(arguments))
    for flag, given in (("--out", run.out), ("--stop-at", run.stop_at), ("--epochs", run.epochs)):
        if given is not None:
            raise UserError(f"{flag} behind -- is the study's own matter: leave it out")
    if run.steps is None:
        raise UserError("the target needs --steps behind --: the updates that scratch gets")
    if run.optim.schedule != "wsd" or not run.optim.decay:
        raise UserError("arms are decayed off a trunk: the target's --schedule must be wsd, with a --decay")
    given = settings.TRAINING_DEFAULTS[run.preset]
    tokenizer = run.tokenizer or train.prepared_tokenizer(run.data) or given["tokenizer"]
    context = run.model.context or settings.preset(run.preset).context
    dataset = open_or_prepare(run.data, tokenizer, context, CACHE)
    names = dataset.heldout
    if not names or (config.heldout and config.heldout not in names):
        raise UserError(f"--heldout {config.heldout}: {run.data} holds out {', '.join(names) or 'nothing'}")
    model = settings.model_config(run, dataset.tokenizer_record["vocab_size"])
    n = round(model.n_layers / config.factor)
    if n < 1 or n * config.factor != model.n_layers:
        raise UserError(f"a target of {model.n_layers} layers is no growth of anything by {config.factor:g}")
    for op in config.ops:
        make_plan(op, n, config.factor)  # refuses a factor that does not fit
    return Target(arguments, run, run.steps, model, dataclasses.replace(model, n_layers=n))


def check_lengths(config: StudyConfig, study: Study) -> None:
    """The earliest fork must lie behind every growth and its re-warming, or it decays an unsettled model."""
    first = study.target.decay_start(min(study.lengths(0)))
    for at in study.grow_steps:
        settled = at + parse_schedule(config.schedule, study.target.steps - at).rewarm
        if not 0 < at < settled <= first:
            raise UserError(
                f"the earliest decay begins at step {first}, but the growth at step {at} is not settled "
                f"before step {settled}: give a smaller fraction, a larger --early or a shorter re-warming"
            )


def tune(study: Study, tuning: list[ArmKey]) -> dict[str, float]:
    """Every arm's learning rate of the lowest decayed loss."""
    best: dict[str, tuple[float, float]] = {}
    for key in tuning:
        arm = study.result(key, (study.target.steps,))
        if arm is None:
            raise UserError(
                f"{study.config.out} lacks {key.name} at {key.lr:g}: leave --report out to train it"
            )
        (point,) = arm.decayed
        name = study.config.heldout or next(iter(point.losses))
        best[key.name] = min(best.get(key.name, (float("inf"), 0.0)), (point.losses[name], key.lr))
    return {name: lr for name, (_, lr) in best.items()}


def is_finished(folder: Path, steps: int) -> bool:
    """Whether a run has logged its end at `steps`."""
    if not (folder / "metrics.jsonl").is_file():
        return False
    return any(row["what"] == END and row["step"] == steps for row in read_log(folder, "event"))


def fork(trunk: Path, step: int, out: Path, steps: int) -> None:
    """A run that goes on from a trunk's checkpoint under a schedule of `steps`. The files are shared: nothing
    that is in a checkpoint is ever written again."""
    if out.exists():
        return
    record = read_config(trunk)
    assert record is not None, f"{trunk} is no run"
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    source = step_path(trunk / "checkpoints", step)
    shutil.copytree(source, step_path(partial / "checkpoints", step), copy_function=os.link)
    write_config(partial, record | {"run": record["run"] | {"steps": steps, "out": str(out)}})
    partial.rename(out)


def main() -> int:
    """Runs the command; returns its exit code."""
    jax.config.update("jax_platforms", "cpu")  # the devices are the arms'
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the arms are told, too
    console = make_console()
    argv = sys.argv[1:]
    at = argv.index("--") if "--" in argv else len(argv)
    config = tyro.cli(StudyConfig, args=argv[:at], prog="python -m stacking.study", description=__doc__)
    target = open_target(config, tuple(argv[at + 1 :]))
    study = Study(config, target)
    check_lengths(config, study)

    lrs = config.lrs or (target.run.optim.lr,)
    tuning = [key for lr in lrs for key in study.keys(config.seeds[0], lr)] if len(lrs) > 1 else []
    jobs = [job for key in tuning for job in study.jobs(key, (target.steps,))]
    if tuning and not config.report:
        console.print(f"tuning: {len(tuning)} arms at {len(lrs)} learning rates, decayed at equal tokens")
        run_jobs(jobs, config.out, config.jobs, config.gpus, console, config.dry_run)
    best: dict[str, float] | float = lrs[0]
    if tuning and not config.dry_run:
        best = tune(study, tuning)
        console.print(
            f"best rates: {', '.join(f'{arm} {lr:g}' for arm, lr in best.items())}", highlight=False
        )

    keys = [key for seed in config.seeds for key in study.keys(seed, best)]
    jobs = [job for key in keys for job in study.jobs(key, study.lengths(key.grown_at))]
    if not config.report:
        console.print(f"the study: {len(keys)} arms, {len(config.seeds)} seeds among them")
        run_jobs(jobs, config.out, config.jobs, config.gpus, console, config.dry_run)
    if config.dry_run:
        return 0
    arms = [arm for key in keys if (arm := study.result(key, study.lengths(key.grown_at)))]
    seeds = {arm.seed for arm in arms if arm.op == "scratch"}  # nothing can be said without it
    arms = [arm for arm in arms if arm.seed in seeds]
    if not arms:
        raise UserError(f"{config.out} holds no decayed scratch run yet: leave --report out to train it")
    record = {
        "study": settings.flatten(config),
        "run": settings.flatten(target.run),
        "models": {"target": dataclasses.asdict(target.model), "base": dataclasses.asdict(target.base)},
        "arms": [dataclasses.asdict(arm) for arm in arms],
        "tuning": [dataclasses.asdict(arm) for key in tuning if (arm := study.result(key, (target.steps,)))],
    }
    path = config.out / "study.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(write_report(config.out, config.heldout), markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    run_command(main)
