"""What is asked at a checkpoint: grow here, or train on?

Everything is decided and refused here, before JAX is imported and before anything is written.
"""

import dataclasses
from pathlib import Path

from core.checkpoint.manifest import Manifest, load_manifest, recorded_hash
from core.checkpoint.steps import list_steps, step_path, tokenizer_carriers
from core.config import ModelConfig
from core.data.batches import Data
from core.data.mixture_options import data_paths
from core.errors import UserError
from core.folder_kinds import Kind, require_kind
from core.run.data import open_recorded_data
from core.run.folder import data_name, require_run
from core.run.log import CARRIED, read_log
from core.run.other_engine import engine_of
from core.run.schedule import why_not_constant
from core.tokenizer import load_tokenizer_of
from stacking.advise.config import LATEST, LEAST_WINDOWS, AdviseConfig
from stacking.growth import run_settings, source_model, steered_settings
from stacking.plan import Plan, choose_plan
from stacking.schedule import REWARM
from train_tpu.config import RunConfig

TRAIN_ON, GROW = "train on", "grow"  # the arms
LEAST = 16  # updates of an arm: 4 to warm up again, 4 at the constant rate, 8 of decay
TRUNK = "trunk"  # the folder with the checkpoint itself, which both arms begin with


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to continue."""

    name: str
    """TRAIN_ON or GROW."""
    model: ModelConfig
    updates: int

    @property
    def decay(self) -> int:
        """Updates at its end in which the learning rate decays: one half."""
        return self.updates // 2

    @property
    def rewarm(self) -> int:
        """Updates at its beginning in which a grown model's learning rate is warmed up again: at most one
        quarter, so that as many are made at the constant rate."""
        return min(REWARM, self.updates // 4)


@dataclasses.dataclass(frozen=True)
class Question:
    """One checkpoint and the two arms that begin there."""

    run: Path
    """The run folder."""
    folder: Path
    """Where the arms are trained."""
    source: Path
    """The run folder that has the checkpoint now: the run's, or the fork that an earlier start made."""
    checkpoint: str
    """What the checkpoint is known by: its manifest's own sha256."""
    manifest: Manifest
    settings: RunConfig
    """The run's, at that checkpoint, as JAX has them."""
    engine: str
    """Which engine trains the run, and so both arms."""
    plan: Plan
    train_on: Arm
    grow: Arm

    @property
    def step(self) -> int:
        """Updates that the run had made there."""
        return self.manifest.step

    @property
    def arms(self) -> tuple[Arm, Arm]:
        """Both, in the order of the table."""
        return self.train_on, self.grow

    def out(self, arm: Arm) -> Path:
        """The run folder of an arm."""
        return self.folder / arm.name.replace(" ", "-")

    def end(self, arm: Arm) -> int:
        """The step at which an arm ends."""
        return self.step + arm.updates

    def tokens(self, arm: Arm) -> int:
        """Tokens that an arm is trained on."""
        return arm.updates * self.settings.batch * arm.model.context

    def flops(self, arm: Arm) -> int:
        """Training FLOPs of an arm from the checkpoint on."""
        return self.tokens(arm) * arm.model.flops_per_token()

    @property
    def lr(self) -> float:
        """The constant learning rate, as it was steered."""
        return steered_settings(self.settings, self.manifest).lr(self.step)

    def seconds(self) -> float | None:
        """About how long both arms take, at the FLOPs per second of the run's newest updates before the
        checkpoint; None where its log has none."""
        rows = [row for row in read_log(self.run, "train") if row["step"] < self.step and CARRIED not in row]
        rates = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
        if not rates:
            return None
        return sum(map(self.flops, self.arms)) / (rates[-1] * self.train_on.model.flops_per_token())


def open_questions(config: AdviseConfig, out: Path) -> list[Question]:
    """What is asked, a question for every checkpoint.

    Raises:
        UserError: there is no such run or checkpoint, its learning rate is not constant there, the plan does
            not make it deeper, or the budget is too small.
    """
    require_kind(config.run, "grow", Kind.CHECKPOINT)
    require_run(config.run, "give one, and with --at which of its checkpoints")
    saved = list_steps(config.run / "checkpoints")
    if not saved:
        raise UserError(f"the run in {config.run} has no checkpoint yet: wait until it has saved one")
    steps = dict.fromkeys(saved[-1] if step == LATEST else int(step) for step in config.at)
    return [_open_question(config, out, step, saved) for step in steps]


def _open_question(config: AdviseConfig, out: Path, step: int, saved: list[int]) -> Question:
    folder = out / f"at-{step}"
    source = folder / TRUNK if (folder / TRUNK).is_dir() else config.run
    if source == config.run and step not in saved:
        raise UserError(
            f"the run in {config.run} has no checkpoint {step}: it has {', '.join(map(str, saved))}"
        )
    step_dir = step_path(source / "checkpoints", step)
    manifest, checkpoint = load_manifest(step_dir), recorded_hash(step_dir)
    if step in saved and recorded_hash(step_path(config.run / "checkpoints", step)) != checkpoint:
        raise UserError(
            f"{folder} was begun from another checkpoint {step} than {config.run} has now: remove it, or "
            "give another --out"
        )
    if manifest.kind != "train":
        raise UserError(f"{step_dir} holds parameters alone, which cannot be trained on: give another --at")
    model, settings = source_model(step_dir, manifest), run_settings(step_dir, manifest)
    why = why_not_constant(settings.optim, step, settings.steps)
    if why:
        raise UserError(
            f"the learning rate of {config.run} is not constant at step {step}: {why}; "
            f"{_where_constant(config.run, saved)}"
        )
    left_out = [end for _, end in steered_settings(settings, manifest).skips if end > step]
    if left_out:
        raise UserError(
            f"updates of {config.run} after step {step} are to be left out (skip=, up to {max(left_out)}), "
            "which would leave the arms unequal: give a later --at"
        )
    plan = choose_plan(config.op, config.factor, config.layers, model.n_layers)
    if plan.n_layers <= model.n_layers:
        raise UserError(
            f"{plan.name} makes {plan.n_layers} layers of {model.n_layers}, which is no growth: give a "
            "larger --factor, or --layers with more layers"
        )
    grown = dataclasses.replace(model, n_layers=plan.n_layers)
    update = settings.batch * model.context
    budget = config.tokens(manifest.tokens)
    train_on, grow = equal_flops(budget / update, model.flops_per_token(), grown.flops_per_token())
    if grow < LEAST:
        least = LEAST * update * grown.flops_per_token() // model.flops_per_token() + update
        raise UserError(
            f"--budget {config.budget} is {budget:,} tokens at step {step}, which leaves the grown model "
            f"{grow} updates, and it needs {LEAST}: give at least {least}"
        )
    engine = engine_of(manifest.config["run"])
    arms = Arm(TRAIN_ON, model, train_on), Arm(GROW, grown, grow)
    return Question(config.run, folder, source, checkpoint, manifest, settings, engine, plan, *arms)


def equal_flops(updates: float, small: int, large: int) -> tuple[int, int]:
    """Updates of both arms within a budget of so many of the ungrown model: as many as the grown model gets
    for it, and as many of the ungrown one as cost the same, to half of one of these.

    small, large: FLOPs per token of the two models.
    """
    grow = int(updates * small / large)
    return round(grow * large / small), grow


def _where_constant(run: Path, saved: list[int]) -> str:
    """Which checkpoints can be asked at instead."""
    there = []
    for step in saved:
        step_dir = step_path(run / "checkpoints", step)
        settings = run_settings(step_dir, load_manifest(step_dir))
        if why_not_constant(settings.optim, step, settings.steps) is None:
            there.append(str(step))
    if there:
        return f"it is at {', '.join(there)}: give --at {there[-1]}"
    return "give a run that has kept a checkpoint from before its decay (--keep-steps)"


def open_data(question: Question, given: str | None) -> tuple[Data, str]:
    """The run's data, and the name of the held-out set that decides.

    given: the one that the user names.

    Raises:
        UserError: the data is gone or has changed, or there is no such set, or it is too small.
    """
    manifest, data = question.manifest, question.settings.data
    path, where = data_name(data), f"checkpoint {question.step} of {question.run}"
    step_dir = step_path(question.source / "checkpoints", question.step)
    carriers = (question.run, *tokenizer_carriers(step_dir), *map(Path, data_paths(data)))
    tokenizer = load_tokenizer_of(manifest.tokenizer, carriers, where)
    dataset = open_recorded_data(data, manifest.data, tokenizer.name, question.train_on.model.context)
    if dataset.fingerprint != manifest.data["fingerprint"]:
        raise UserError(
            f"{path} is no longer what {where} was trained on (fingerprint {dataset.fingerprint[:12]}, then "
            f"{manifest.data['fingerprint'][:12]}), so that neither arm could continue it: bring that back"
        )
    names = dataset.heldout
    if not names:
        raise UserError(f"{path} holds out no text to compare on: prepare it with a held-out set")
    name = names[0] if given is None else given
    if name not in names:
        raise UserError(f"--heldout {name}: {path} holds out {', '.join(names)}")
    windows = dataset.splits[name].windows
    if windows < LEAST_WINDOWS:
        raise UserError(
            f"the held-out set {name} of {path} has {windows} windows, and a standard error needs "
            f"{LEAST_WINDOWS}: name another one with --heldout, or prepare more held-out text"
        )
    return dataset, name
