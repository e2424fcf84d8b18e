"""A training run of PyTorch, from its `Job` to its exit code: folder, state, memory, loop, result."""

import contextlib
import functools
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from core.checkpoint.manifest import Manifest, code_version, load_manifest
from core.checkpoint.steps import find_step, list_steps
from core.console import make_console
from core.errors import UserError
from core.extras import install_command
from core.folder_kinds import RESULT
from core.progress import Activity
from core.run.curve import plot_curve
from core.run.folder import check_run_folder, hold_folder, write_config
from core.run.guard import changed_measure
from core.run.interrupt import EXIT_FINISHED, Interrupt
from core.run.log import END, SAMPLES, read_log
from core.run.schedule import check_room
from core.run.training_run import run_loop
from core.tokenizer import Tokenizer
from port_torch.training import checkpoint
from port_torch.training.distributed import Distributed
from port_torch.training.engine import TorchEngine
from port_torch.training.result import ADAPTER, why_damaged, write_result
from port_torch.training.settings import TrainerConfig
from port_torch.training.setup import Job, describe, is_compiled, load_kernels
from port_torch.training.step import TrainStep
from port_torch.training.watch import Watch
from port_torch.tuned import command_to_try


def train(job: Job, ranks: Distributed) -> int:
    """Runs the job to its end or to an interruption; returns the exit code of `core.run.interrupt`."""
    config, out = job.config, job.out
    console = make_console(quiet=not ranks.first)
    rows = config.batch // ranks.size  # a batch that is not divisible was refused with the data
    with contextlib.ExitStack() as stack:
        tasks = open_tasks(config, job.tokenizer, ranks)
        if tasks:
            stack.enter_context(tasks)
        ranks.first_does(lambda: enter_folder(job, stack, console))
        ranks.require_shared(out)
        interrupt = stack.enter_context(Interrupt())
        train_step = make_train_step(job, ranks)
        if model_alone(out):
            console.print(f"the run in {out} has finished; its model: {out / RESULT}")
            return EXIT_FINISHED
        with Activity("making the state to start from", console=console):
            manifest, how = starting_state(job, train_step, console)
        if is_done(job, manifest.step):
            if ranks.first:
                write_result(job, find_step(out), manifest)
            made = f"the run in {out} has made its {manifest.step} updates; its model: {out / RESULT}"
            console.print(made)
            return EXIT_FINISHED
        job.require_profile(manifest.step)
        load_kernels(config, ranks)
        every = getattr(config, "watch_every", 0)  # of runs that pretrain
        watch = Watch(job.decoder, train_step.parameters, every) if every and ranks.first else None
        with Activity("trying out an update", console=console):
            grad_accum_steps = choose_grad_accum_steps(job, train_step, rows)
        if ranks.first:
            job.tokenizer.carry(out)
            write_config(out, job.record)
        announce(job, train_step, console, how, rows, grad_accum_steps)
        batches = job.batches(manifest.sequences)
        stack.callback(batches.close)
        folder, micro_batch = job.checkpoints, rows // grad_accum_steps
        engine = TorchEngine(
            train_step,
            grad_accum_steps,
            micro_batch,
            job.heldout,
            tasks,
            folder,
            config.keep,
            watch,
            config.kernels,
        )
        code = run_loop(
            job,
            engine,
            batches,
            manifest,
            interrupt=interrupt,
            console=console,
            first=ranks.first,
            how=how,
            parts=grad_accum_steps,
        )
    if code == EXIT_FINISHED and ranks.first:
        report_end(job, console)
    return code


def enter_folder(job: Job, stack: contextlib.ExitStack, console: Console) -> None:
    """Makes the run folder or checks the one to resume, and holds it as long as the stack is open."""
    say = functools.partial(console.print, highlight=False)
    stack.enter_context(hold_folder(job.out, say))
    check_run_folder(job.out, job.record, job.config.allow_change, job.defaults)


def make_train_step(job: Job, ranks: Distributed) -> TrainStep:
    """The job's model with its optimizer, not trained yet."""
    config = job.config
    return TrainStep(
        job.decoder,
        config.optim,
        ranks,
        seed=config.seed,
        z_loss=config.z_loss,
        bf16=config.dtype == "bfloat16",
        compiled=is_compiled(config, ranks),
        guard=config.guard,
    )


def is_done(job: Job, step: int) -> bool:
    """Whether a run at `step` has made its updates, all or those up to --stop-at; see `is_finished`."""
    return job.is_finished(step) or (job.end < job.steps and step >= job.end)


def choose_grad_accum_steps(job: Job, train_step: TrainStep, rows: int) -> int:
    """Micro-batches of a rank's `rows` rows: --grad-accum-steps, or more for the memory.

    Raises:
        UserError: they do not divide the rows, or a single row does not fit.
    """
    given = job.config.grad_accum_steps
    if rows % given:
        raise UserError(
            f"--grad-accum-steps {given} does not divide the {rows} rows of a process evenly: give a "
            f"divisor of {rows}"
        )
    return train_step.fit(rows, given, job.example) if train_step.ranks.device.type == "cuda" else given


def announce(
    job: Job, train_step: TrainStep, console: Console, how: str, rows: int, grad_accum_steps: int
) -> None:
    """Says what will run, where the state comes from (`how`), and whether a rank's `rows` rows make more
    micro-batches than were asked for."""
    config = job.config
    describe(job, train_step.ranks, train_step.recorded).print(console)
    if note := check_room(config.optim, job.steps):
        console.print(f"note: {note}", highlight=False)
    console.print(how, highlight=False)
    if grad_accum_steps != config.grad_accum_steps:
        console.print(
            f"out of memory with {rows // config.grad_accum_steps} sequences at once: continuing with "
            f"{rows // grad_accum_steps} (--grad-accum-steps {grad_accum_steps}); the batch stays "
            f"{config.batch}"
        )


def report_end(job: Job, console: Console) -> None:
    """Writes the result of a finished run, and says where it is and what one does next."""
    out, step_dir = job.out, find_step(job.out)
    manifest = load_manifest(step_dir)
    folder = write_result(job, step_dir, manifest)
    adapters = f"the adapters alone, for peft: {out / ADAPTER}\n" if job.lora else ""
    samples = f"; samples: {out / SAMPLES}" if (out / SAMPLES).exists() else ""
    console.print(
        f"loss curve: {plot_curve(out)}{samples}\n"
        f"the model: {folder}, a folder for transformers, proved by its logits\n{adapters}"
        f"next: {command_to_try(folder, manifest)}",
        highlight=False,
        soft_wrap=True,
    )


def open_tasks(config: TrainerConfig, tokenizer: Tokenizer, ranks: Distributed) -> Any:
    """What evaluates --eval-tasks; None without: training needs the package eval only then.

    Raises:
        UserError: lm-eval is not installed, there are several processes, or a task cannot be opened.
    """
    if not config.eval_tasks:
        return None
    if ranks.size > 1:
        ranks.refuse("--eval-tasks cannot be used with several processes: leave it out, or use one process")
    try:
        from eval.training import TaskEvaluator, torch_backend
    except ImportError as error:
        raise UserError(f"--eval-tasks needs lm-eval ({error}): {install_command('eval')}") from None
    return TaskEvaluator(config.eval_tasks, config.eval_data_dir, tokenizer, torch_backend)


def model_alone(out: Path) -> bool:
    """Whether a run has finished, and its checkpoints were removed and its model kept.

    Raises:
        UserError: its model was removed, too, or changed.
    """
    if list_steps(out / "checkpoints") or not any(row["what"] == END for row in read_log(out, "event")):
        return False
    damage = why_damaged(out / RESULT)
    if damage:
        raise UserError(
            f"the run in {out} has finished, its checkpoints were removed, and of its model {damage}; or "
            "train again, with another --out"
        )
    return True


def starting_state(job: Job, train_step: TrainStep, console: Console) -> tuple[Manifest, str]:
    """The manifest of the state that the train_step then has, and in words where that comes from."""
    out, ranks = job.out, train_step.ranks
    manifest = job.new_manifest(lineage=job.lineage, code=code_version() | {"torch": torch.__version__})
    say = functools.partial(console.print, highlight=False)
    step_dir = job.find_start(ranks, say)
    if step_dir is None:
        source = f"the parameters of {job.lineage[-1]['path']}" if job.lineage else "random parameters"
        return manifest, f"starting a new run in {out} from {source} (seed {job.config.seed})"
    job.require_same_origin(load_manifest(step_dir), job.lineage)
    old = checkpoint.restore(step_dir, train_step)
    if ranks.first:
        job.leave_newer(say)
    train_step.guard.streak.zero_()  # a run that the guard halted resumes behind the batches that halted it
    changed = changed_measure(old, manifest)
    manifest = job.resume(manifest, old)
    how = job.how_resumed(old, manifest)
    if changed:
        train_step.guard.empty()
        how += f"; the guard starts anew, for other {' and '.join(changed)}"
    return manifest, how
