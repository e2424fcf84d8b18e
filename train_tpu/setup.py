"""What a training run needs before it begins: settings, data, devices, and what to start from.

Nothing of the run is written here, so whatever is refused leaves nothing behind.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from core import processes
from core.attention import Choice
from core.checkpoint.checkpointer import restore_params
from core.checkpoint.manifest import Manifest, load_manifest
from core.checkpoint.steps import find_step, list_steps
from core.compilation_cache import keep_compiled
from core.config import ModelConfig, compute_dtype, training_flags
from core.data.batches import Data, data_record, require_records
from core.documents import document_mark
from core.errors import UserError
from core.folder_kinds import Kind, require_kind
from core.gpu_memory import require_free_memory
from core.model import Params, require_fit
from core.progress import Activity, make_console
from core.run.data import choose_run_tokenizer, open_data
from core.run.folder import read_config, require_folder, run_record
from core.run.presets import TRAINING_DEFAULTS, count_steps
from core.run.schedule import check_room
from core.run.settings import model_config
from core.run.training_run import TrainingRun
from core.sampling import require_room
from core.sharding import (
    MeshShape,
    check_mesh,
    describe_replication,
    make_mesh,
    parse_mesh,
    require_deterministic_operations,
)  # fmt: skip
from core.tokenizer import Tokenizer
from core.tokenizer import require_same as require_same_tokenizer
from train_tpu.backend import KernelsChoice, choose_kernels, choose_step, split_batch
from train_tpu.config import RunConfig
from train_tpu.report import describe
from train_tpu.step import StepConfig, abstract_state

Source = tuple[Path, Manifest, Params]


@dataclasses.dataclass(frozen=True)
class Setup(TrainingRun):
    """A run that can begin."""

    config: RunConfig
    """With what `auto` and defaults stand for on these devices."""
    out: Path
    dataset: Data
    tokenizer: Tokenizer
    prompts: list[list[int]]
    steps: int
    mesh: Mesh
    step: StepConfig
    record: dict[str, Any]
    source: Source | None
    """The checkpoint that --init-from names, its manifest and its parameters; None for a run that resumes."""
    console: Console


def prepare_run(config: RunConfig) -> Setup:
    """Settings, data and devices of a run; what cannot be is refused before the data is prepared."""
    out = config.out or Path("runs") / config.preset
    if config.deterministic:
        require_deterministic_operations()
    require_free_memory()
    processes.join(config.coordinator, config.num_processes, config.process_id)
    refuse_alone(config)
    keep_compiled()
    require_folder(out)
    if config.init_from:
        require_kind(config.init_from, "start", Kind.CHECKPOINT)
    model_config(config, vocab_size=1)
    with Activity("finding the devices"):
        shape = mesh_shape(config, out)
    kernels = choose_kernels(config.kernels, jax.local_devices()[0])
    console = make_console(quiet=not processes.is_first())

    # Data and tokenizer.
    given = TRAINING_DEFAULTS[config.preset]
    tokenizer = choose_run_tokenizer(config, given["tokenizer"])
    model = model_config(config, tokenizer.vocab_size)
    require_fit(model)
    prompts = [tokenizer.begin(prompt) for prompt in config.prompts]
    if prompts:
        require_room(prompts, model.context)
    dataset = processes.in_turn(lambda: open_data(config, tokenizer.name, model.context, out))
    require_records(dataset, config.leave_out, "--leave-out")
    steps = count_steps(config, dataset)

    # Devices, and what will compute on them.
    mesh = make_mesh(shape)
    config, step, attention = settle(config, model, mesh, kernels, tokenizer)
    console.print(describe(config, model, dataset, steps, mesh, step.compute, attention, kernels))
    notes = (check_room(config.optim, steps), describe_dtype(config.dtype, out))
    for note in (*notes, describe_replication(model, shape)):
        if note:
            console.print(f"note: {note}", markup=False, highlight=False)

    # What the run starts from is opened before its folder is made, so that a refusal leaves nothing behind.
    alone = dataclasses.replace(config, coordinator=None, num_processes=None, process_id=None)
    record = run_record(alone, model, steps, dataset.tokenizer_record, data_record(dataset))
    source = None
    if config.init_from and not config.show_sharding and not list_steps(out / "checkpoints"):
        with Activity(f"opening {config.init_from}", console=console):
            source = open_source(config.init_from, step, record, mesh)
    return Setup(config, out, dataset, tokenizer, prompts, steps, mesh, step, record, source, console)


def settle(
    config: RunConfig, model: ModelConfig, mesh: Mesh, kernels: KernelsChoice, tokenizer: Tokenizer
) -> tuple[RunConfig, StepConfig, Choice]:
    """The settings with what they stand for on the devices of `mesh`, the step that is compiled for them, and
    its attention."""
    config = dataclasses.replace(config, grad_accum_steps=split_batch(config, model, mesh))
    shape = MeshShape(**mesh.shape)
    check_mesh(model, shape, config.batch, config.grad_accum_steps)
    step, attention = choose_step(config, model, mesh, kernels.kernels)
    if config.document_mask:
        step = dataclasses.replace(step, documents=document_mark(tokenizer))
    return dataclasses.replace(config, dtype=step.compute.dtype), step, attention


def refuse_alone(config: RunConfig) -> None:
    """Refuses options that need a single process, where there are several."""
    for flag, given in (("--eval-tasks", config.eval_tasks), ("--fallback", config.fallback)):
        if given and processes.are_several():
            raise UserError(f"{flag} cannot be used with several processes: leave it out, or use one process")


def mesh_shape(config: RunConfig, out: Path) -> MeshShape:
    """The mesh over the devices found; a UserError if --mesh does not fit them."""
    n_devices = jax.device_count()
    saved = read_config(out)
    if saved and config.mesh and saved["run"].get("mesh") == config.mesh:
        try:
            return parse_mesh(config.mesh, n_devices)
        except UserError:
            raise UserError(
                f"the run in {out} is for --mesh {config.mesh}, but there are {n_devices} devices here: give "
                f"--mesh {MeshShape(data=n_devices)} --allow-change mesh to resume it here"
            ) from None
    return parse_mesh(config.mesh, n_devices)


def describe_dtype(dtype: str, out: Path) -> str | None:
    """A note for a run that is resumed with another dtype than a new run here would have; None otherwise."""
    here = compute_dtype("auto", jax.default_backend())
    if dtype == here or not list_steps(out / "checkpoints"):
        return None
    return (
        f"the run was started in {dtype} and continues in it; a new run here would compute in {here} "
        f"(--dtype {here} --allow-change dtype)"
    )


def open_source(path: Path, step: StepConfig, record: dict[str, Any], mesh: Mesh) -> Source:
    """The checkpoint that --init-from names, its manifest and its parameters."""
    step_dir = find_step(path)
    manifest = load_manifest(step_dir)
    require_same_tokenizer(manifest.tokenizer, record["tokenizer"], str(step_dir), "the data given")
    saved = ModelConfig(**manifest.config["model"])
    require_same_function(step_dir, saved, step.model, manifest.tokenizer["vocab_size"])
    return step_dir, manifest, restore_params(step_dir, abstract_state(step, mesh).params)


def require_same_function(step_dir: Path, saved: ModelConfig, model: ModelConfig, n_ids: int) -> None:
    """Refuses to start from parameters of another model; the context may differ where positions are rotary.

    Heads, theta and the like show in no shape, so the parameters would load and compute something else.
    n_ids: of the saved model's tokenizer.
    """
    here = model.function()
    for name, there in saved.function().items():
        free = name == "context" and model.positions == saved.positions == "rope"
        if there != here[name] and not free:
            raise UserError(
                f"{step_dir} is a model with {name} {there}, not {here[name]}: to start from it, give "
                f"{training_flags(saved, n_ids)}"
            )
