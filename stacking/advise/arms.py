"""How the two arms are trained: forks of the checkpoint, each in a process of its own."""

from pathlib import Path
from typing import Any

from core.checkpoint.manifest import JAX, TORCH
from core.checkpoint.steps import step_path
from core.errors import UserError
from core.run.folder import read_config, recorded_run
from core.run.other_engine import ENGINE_SETTINGS, KEPT
from core.run.settings import current_names
from stacking.advise.config import AdviseConfig
from stacking.advise.question import TRUNK, Arm, Question
from stacking.forks import NEVER, fork, halt_step, in_words, is_finished
from stacking.jobs import Job

COMMAND = {JAX: "train_tpu.run", TORCH: "port_torch.train"}
GROWN = "grown"  # the folder of the grown checkpoint, in the schedule of the run
# What is not of this comparison: evaluations, samples and checkpoints on the way.
QUIET = {
    "eval_every": 0, "eval_tasks": "", "sample_every": 0, "prompts": [], "save_every": NEVER, "keep_last": 1,
    "keep_every": None, "keep_steps": [], "watch_every": 0,
}  # fmt: skip


def keep_checkpoint(question: Question) -> None:
    """A fork of the run at the checkpoint, which is there even when the run deletes its own."""
    manifest = question.manifest
    record = recorded_run(manifest) | {"run": current_names(manifest.config["run"])}
    fork(question.source, question.step, question.folder / TRUNK, {}, record)


def jobs(question: Question, config: AdviseConfig) -> list[Job]:
    """What has to be done for a question."""
    trunk, grown = question.folder / TRUNK, question.folder / GROWN
    steps = max(question.settings.steps, question.end(question.grow))  # either is a constant rate here
    schedule = ("--schedule", f"rewarm:{question.grow.rewarm}", "--steps", str(steps))
    growing = Job(
        name=_name(grown),
        command=(
            "stacking.grow", str(step_path(trunk / "checkpoints", question.step)), "--out", str(grown),
            *config.plan_arguments, *schedule,
        ),
        done=grown.exists,
        needs=(),
        cost=0,
    )  # fmt: skip
    train_on, grow = question.arms
    return [_train(question, train_on, trunk, ()), growing, _train(question, grow, grown, (growing.name,))]


def _train(question: Question, arm: Arm, source: Path, needs: tuple[str, ...]) -> Job:
    out, end = question.out(arm), question.end(arm)
    return Job(
        name=_name(out),
        command=(COMMAND[question.engine], "--out", str(out)),
        done=lambda: is_finished(out, end) or halt_step(out) is not None,
        needs=needs,
        cost=question.flops(arm),
        outcome=lambda: in_words(halt_step(out)),
        before=lambda: fork(source, question.step, out, _changes(question, arm), _record(question, source)),
    )


def _changes(question: Question, arm: Arm) -> dict[str, Any]:
    """The settings of an arm that are not the run's."""
    length = question.end(arm) - question.settings.optim.schedule_start
    return QUIET | {
        "steps": question.end(arm), "decay": arm.decay / length, "log_every": max(1, arm.updates // 10),
    }  # fmt: skip


def _record(question: Question, source: Path) -> dict[str, Any]:
    """What config.json says in `source`. Growing writes it for JAX: what says how PyTorch computes is added
    for a run of PyTorch."""
    record = read_config(source)
    if record is None:
        raise UserError(f"{source} has lost its config.json: remove {source.parent} and ask again")
    run = question.manifest.config["run"]
    if question.engine == JAX or "compile" in record["run"]:
        return record
    return record | {KEPT: {name: value for name, value in run.items() if name in ENGINE_SETTINGS}}


def require_compared(question: Question) -> None:
    """Refuses to compare an arm that the guard has halted."""
    for arm in question.arms:
        if halt_step(question.out(arm)) is not None:
            raise UserError(
                f"the guard halted {question.out(arm)}, so there is nothing to compare: see its log, "
                "and ask at another step"
            )


def _name(folder: Path) -> str:
    return str(Path(folder.parent.name) / folder.name)
