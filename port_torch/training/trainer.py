"""The course of a run, the same for both commands: folder, state, memory, loop, result.

The commands say what is trained on what (`Job`); everything from there on is here, in order.
"""

import contextlib
import dataclasses
import functools
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.nn.attention import SDPBackend

from core.checkpoint.manifest import Manifest, code_version, load_manifest
from core.checkpoint.steps import find_start, find_step, leave_newer, list_steps
from core.cli import command
from core.config import ModelConfig
from core.errors import UserError
from core.extras import install_command
from core.model import compute_dtype
from core.run.curve import plot_curve
from core.run.folder import check_run_folder, lock_folder, require_folder, write_config
from core.run.guard import changed_measure
from core.run.interrupt import EXIT_FINISHED, Interrupt
from core.run.log import SAMPLES, read_log
from core.run.loop import END, is_finished, run_loop
from core.run.progress import make_console
from core.run.schedule import check_room, require_continuous
from core.tokenizer import Tokenizer
from kernels_cuda import library
from port_torch.card import Tuning
from port_torch.model import Decoder
from port_torch.training import checkpoint
from port_torch.training.batches import Batch, HeldOut, Rows
from port_torch.training.distributed import Distributed
from port_torch.training.engine import TorchEngine, device_name
from port_torch.training.result import FOLDER, why_damaged, write_result
from port_torch.training.settings import TrainerConfig
from port_torch.training.step import TrainStep


@dataclasses.dataclass
class Job:
    """What is trained, on what, and where."""

    config: TrainerConfig
    out: Path
    defaults: TrainerConfig
    """The command's own, for settings that a run to be resumed is older than."""
    decoder: Decoder
    """On its device; what needs no gradient is not trained."""
    tokenizer: Tokenizer
    record: dict[str, Any]
    """What config.json and the manifests say: `core.run.folder.run_record`."""
    lineage: list[dict[str, Any]]
    """What the parameters come from."""
    steps: int
    batches: Callable[[int], Iterator[Batch]]
    """This rank's batches from the global batch on whose first sequence has that index."""
    example: Callable[[int], Rows]
    """That many rows as training has them, to try the memory with."""
    heldout: list[HeldOut]
    prompts: list[list[int]]
    """Ids that the samples go on from."""
    table: list[tuple[str, str]]
    """What is told about model and data."""
    tuning: Tuning | None = None
    """What the card says of a fine-tuned model."""

    @property
    def end(self) -> int:
        """Updates after which to stop: `steps`, or fewer."""
        return self.steps if self.config.stop_at is None else min(self.steps, self.config.stop_at)


def begin(config: TrainerConfig, out: Path, ranks: Distributed) -> TrainerConfig:
    """The settings as a run records them: `auto` as what it stands for on this device.

    Raises:
        UserError: no run can be written to `out`; told before anything slow.
    """
    require_folder(out)
    platform = "cpu" if ranks.device.type == "cpu" else "gpu"
    return dataclasses.replace(config, dtype=compute_dtype(config.dtype, platform))


def load_kernels(config: TrainerConfig, ranks: Distributed) -> None:
    """Takes the CUDA kernels where they are, and says on stderr which run.

    The first rank goes before the others: it may have to compile them, and it says what it found. Where it
    finds none, no other rank compiles them again or runs what it does not.

    Raises:
        UserError: they must run, and a rank has none.
    """
    failure, found = None, True
    if ranks.first:
        try:
            found = library.load(config.kernels).file is not None
        except UserError as error:
            failure, found = error, False
    if ranks.largest(int(not found)):  # of the first rank alone: the others have not looked
        if failure is not None:
            raise failure
        if config.kernels == "cuda":
            raise UserError("--kernels cuda is not possible: the first process has none, and says why")
        return
    if not ranks.first:
        with contextlib.redirect_stderr(io.StringIO()):
            source = library.load(config.kernels)
        if source.file is None:
            print(f"kernels of process {ranks.rank}: {source.reason}", file=sys.stderr)


def require_deterministic_operations() -> None:
    """Lets PyTorch use no operation on a GPU whose result varies; before anything is computed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # its gradient adds in no fixed order


def train(job: Job, ranks: Distributed) -> int:
    """Runs the job to its end or to an interruption; returns the exit code of `core.run.interrupt`."""
    config, out = job.config, job.out
    console = make_console(quiet=not ranks.first)
    rows = ranks.rows(config.batch)
    part = rows.stop - rows.start
    with contextlib.ExitStack() as stack:
        tasks = open_tasks(config, job.tokenizer, ranks)
        if tasks:
            stack.enter_context(tasks)
        ranks.first_does(lambda: enter_folder(job, stack))
        ranks.require_shared(out)
        interrupt = stack.enter_context(Interrupt())
        train_step = make_train_step(job, ranks)
        if model_alone(out):
            console.print(f"the run in {out} has finished; its model: {out / FOLDER}", markup=False)
            return EXIT_FINISHED
        manifest, how = starting_state(job, train_step, console)
        if is_done(job, manifest.step):
            if ranks.first:
                write_result(out, find_step(out), job.decoder, job.tokenizer, manifest, job.tuning)
            made = f"the run in {out} has made its {manifest.step} updates; its model: {out / FOLDER}"
            console.print(made, markup=False)
            return EXIT_FINISHED
        load_kernels(config, ranks)
        parts = choose_parts(job, train_step, part)
        if ranks.first:
            job.tokenizer.carry(out)
            write_config(out, job.record)
        announce(job, ranks, console, how, part, parts)
        batches = job.batches(manifest.sequences)
        stack.callback(batches.close)
        checkpoints = out / "checkpoints"
        code = run_loop(
            out=out,
            first=ranks.first,
            console=console,
            how=how,
            settings=config,
            engine=TorchEngine(
                train_step, parts, part // parts, job.heldout, tasks, checkpoints, config.keep
            ),
            batches=batches,
            manifest=manifest,
            steps=job.steps,
            end=job.end,
            prompts=job.prompts,
            tokenizer=job.tokenizer,
            interrupt=interrupt,
            parts=parts,
        )
    if code == EXIT_FINISHED and ranks.first:
        report_end(job, console)
    return code


def enter_folder(job: Job, stack: contextlib.ExitStack) -> None:
    """Makes the run folder or checks the one to resume, and holds it as long as the stack is open."""
    stack.enter_context(lock_folder(job.out))
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


def is_compiled(config: TrainerConfig, ranks: Distributed) -> bool:
    """Whether torch.compile is used."""
    return ranks.device.type == "cuda" if config.compile is None else config.compile


def is_done(job: Job, step: int) -> bool:
    """Whether a run at `step` has made its updates, all or those up to --stop-at; see `is_finished`."""
    return is_finished(job.out, step, job.steps) or (job.end < job.steps and step >= job.end)


def choose_parts(job: Job, train_step: TrainStep, part: int) -> int:
    """In how many parts a rank computes its `part` rows: --grad-accum-steps, or more for the memory."""
    parts = job.config.grad_accum_steps
    if part % parts:
        raise UserError(
            f"--grad-accum-steps {parts} does not cut the {part} rows of a process into equal parts: give a "
            f"divisor of {part}"
        )
    return train_step.fit(part, parts, job.example) if train_step.ranks.device.type == "cuda" else parts


def announce(job: Job, ranks: Distributed, console: Console, how: str, part: int, parts: int) -> None:
    """Says what will run, where the state comes from (`how`), and whether a rank's `part` rows are cut more
    often than was asked for."""
    config = job.config
    console.print(describe(job, ranks))
    if note := check_room(config.optim, job.steps):
        console.print(f"note: {note}", markup=False, highlight=False)
    console.print(how, markup=False, highlight=False)
    if parts != config.grad_accum_steps:
        console.print(
            f"out of memory with {part // config.grad_accum_steps} sequences at once: continuing with "
            f"{part // parts} (--grad-accum-steps {parts}); the batch stays {config.batch}"
        )


def report_end(job: Job, console: Console) -> None:
    """Writes the result of a finished run, and says where it is and what one does next."""
    out, step_dir = job.out, find_step(job.out)
    folder = write_result(out, step_dir, job.decoder, job.tokenizer, load_manifest(step_dir), job.tuning)
    samples = f"; samples: {out / SAMPLES}" if (out / SAMPLES).exists() else ""
    arguments = job.tuning.arguments if job.tuning else "--prompt The"
    console.print(
        f"loss curve: {plot_curve(out)}{samples}\n"
        f"the model: {folder}, a folder for transformers, proved by its logits\n"
        f"next: {command('port_torch.generate', folder)} {arguments}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def open_tasks(config: TrainerConfig, tokenizer: Tokenizer, ranks: Distributed) -> Any:
    """What evaluates --eval-tasks; None without: training needs the package eval only then."""
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
    damage = why_damaged(out / FOLDER)
    if damage:
        raise UserError(
            f"the run in {out} has finished, its checkpoints were removed, and of its model {damage}; or "
            "train again, with another --out"
        )
    return True


def starting_state(job: Job, train_step: TrainStep, console: Console) -> tuple[Manifest, str]:
    """The manifest of the state that the train_step then has, and in words where that comes from."""
    out, record, ranks = job.out, job.record, train_step.ranks
    manifest = Manifest(
        kind="train", step=0, sequences=0, tokens=0, config={name: record[name] for name in ("model", "run")},
        tokenizer=record["tokenizer"], data={"fingerprint": record["data"]["fingerprint"], "cursor": 0},
        lineage=job.lineage, code=code_version() | {"torch": torch.__version__},
    )  # fmt: skip
    say = functools.partial(console.print, markup=False, highlight=False)
    folder = out / "checkpoints"

    def check(start: Manifest) -> None:
        require_continuous(start.config["run"], record["run"], start.step, out)

    start = (job.config.from_step, job.config.fallback, check, say)
    step_dir = ranks.in_turn(lambda: find_start(folder, *start))
    ranks.require_equal(load_manifest(step_dir).to_json() if step_dir else "", f"checkpoint in {folder}")
    if step_dir is None:
        origin = f"the parameters of {job.lineage[-1]['path']}" if job.lineage else "random parameters"
        return manifest, f"starting a new run in {out} from {origin} (seed {job.config.seed})"
    require_same_origin(job, load_manifest(step_dir).lineage)
    old = checkpoint.restore(step_dir, train_step)
    if job.config.from_step is not None and ranks.first:
        for left in leave_newer(folder, job.config.from_step):
            say(f"a newer checkpoint is left, as {left}")
    how = f"resuming {out} at step {old.step} ({old.sequences:,} sequences read)"
    train_step.guard.streak.zero_()  # a run that the guard halted resumes behind the batches that halted it
    changed = changed_measure(old, manifest)
    if changed:
        train_step.guard.empty()
        how += f"; the guard starts anew, for other {' and '.join(changed)}"
    manifest = manifest.resumed_from(old)
    return manifest, how


def require_same_origin(job: Job, lineage: list[dict[str, Any]]) -> None:
    """Refuses to resume on a folder whose weights are not those that the run was started from."""
    before, now = (entries[-1].get("sha256") if entries else None for entries in (lineage, job.lineage))
    if before != now:
        raise UserError(
            f"the run in {job.out} was not started from the weights that are given now: give the same "
            "folder, unchanged, or another --out"
        )


def describe(job: Job, ranks: Distributed) -> Table:
    """The table a run begins with."""
    model, config = job.decoder.config, job.config
    bf16, compiled = config.dtype == "bfloat16", is_compiled(config, ranks)
    trained = sum(p.numel() for p in job.decoder.parameters() if p.requires_grad)
    tokens = job.steps * config.batch * model.context
    rows = [
        ("model", f"{model.n_layers} layers, width {model.d_model}, {model.n_heads} heads, "
                  f"MLP {model.d_mlp}, context {model.context}; {model.positions}, {model.mlp}"),
        ("parameters", f"{model.n_params:,}, of which {trained:,} are trained"),
        *job.table,
        ("training", f"{job.steps:,} steps of {config.batch} x {model.context} = {tokens:,} places"),
        ("optimizer", f"AdamW for all parameters, peak lr {config.optim.lr:g}, {config.optim.schedule}, "
                      f"warmup {config.optim.warmup}"),
        ("devices", f"{ranks.size} x {device_name(ranks)}, {'bfloat16' if bf16 else 'float32'}"
                    f"{', compiled' if compiled else ''}"),
        ("attention", attention_name(model, ranks.device, bf16, job.example(1).documents is not None)),
    ]  # fmt: skip
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(Text, row))  # not markup: names of files and fields may hold brackets
    return table


def attention_name(model: ModelConfig, device: torch.device, bf16: bool, packed: bool) -> str:
    """Which of PyTorch's attentions will run."""
    shape = (1, model.n_heads, model.context, model.head_dim)
    q = torch.zeros(shape, device=device, dtype=torch.bfloat16 if bf16 else torch.float32, requires_grad=True)
    mask = torch.ones(shape[2], shape[2], dtype=torch.bool, device=device) if packed else None
    backend = SDPBackend(torch._fused_sdp_choice(q, q, q, mask, 0.0, not packed))
    kind = "a mask of documents" if packed else "causal"
    return f"PyTorch's {backend.name.removesuffix('_ATTENTION').lower()} ({kind})"
