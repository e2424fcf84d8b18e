"""What a training run needs before it begins: settings, data, devices, and what to start from.

Nothing of the run is written here, so whatever is refused leaves nothing behind.
"""

import abc
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

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
from core.console import make_console
from core.data.batches import Data, data_record, require_records, train_batches
from core.data.sequences import HeldOut, heldout_sets
from core.documents import document_mark
from core.errors import UserError
from core.folder_kinds import Kind, require_kind
from core.gpu_memory import require_free_memory
from core.model import Params, require_fit
from core.progress import Activity
from core.run.data import choose_run_tokenizer, open_data, trained_before
from core.run.folder import begun_record, require_folder, run_record
from core.run.presets import TRAINING_DEFAULTS, count_steps
from core.run.rates import with_rate
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
from core.tokenizer import Tokenizer, id_dtype
from core.tokenizer import require_same as require_same_tokenizer
from train_tpu.backend import KernelsChoice, choose_kernels, choose_step, split_batch
from train_tpu.config import JaxSettings, RunConfig
from train_tpu.engine import own_rows
from train_tpu.report import describe, next_commands, pretraining_rows
from train_tpu.step import StepConfig, abstract_model


class Source(NamedTuple):
    """The checkpoint that a run begins with."""

    step_dir: Path
    manifest: Manifest
    params: Params | None
    """None where they are not needed, since the run resumes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup(TrainingRun, abc.ABC):
    """A run that can begin."""

    config: JaxSettings
    """With what `auto` and defaults stand for on these devices."""
    out: Path
    tokenizer: Tokenizer
    prompts: list[list[int]]
    steps: int
    mesh: Mesh
    step: StepConfig
    record: dict[str, Any]
    source: Source | None
    """What --init-from names; None for random parameters."""
    console: Console

    @property
    @abc.abstractmethod
    def defaults(self) -> JaxSettings:
        """The command's own, for settings that a run to be resumed is older than."""

    @property
    @abc.abstractmethod
    def heldout(self) -> list[HeldOut]:
        """What is scored and never trained on."""

    @property
    def frozen(self) -> tuple[Params, ...]:
        """The model's parameters, in a run that trains adapters; otherwise nothing."""
        return ()

    @abc.abstractmethod
    def open_batches(self, start: int) -> Any:
        """This process's rows of the global batches, from the one on whose first sequence is `start`."""

    @abc.abstractmethod
    def begun(self, manifest: Manifest) -> tuple[Manifest, str]:
        """The manifest of the run before its first update, and in words what its parameters come from."""

    @abc.abstractmethod
    def require_same_source(self, old: Manifest) -> None:
        """Refuses to resume from the checkpoint of `old`, where it began with other weights than `source`."""

    @abc.abstractmethod
    def commands(self) -> str:
        """What one types after the run."""

    @property
    def own_rows(self) -> list[int]:
        """Which rows of a global batch are this process's."""
        return own_rows(self.config.batch, self.config.grad_accum_steps, self.mesh).ravel().tolist()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining(Setup):
    """A run on prepared data. Its source is None where it resumes, too."""

    config: RunConfig
    dataset: Data

    @property
    def defaults(self) -> JaxSettings:
        """See `Setup`."""
        return RunConfig()

    @property
    def heldout(self) -> list[HeldOut]:
        """See `Setup`."""
        return heldout_sets(self.dataset, self.step.documents)

    def open_batches(self, start: int) -> Any:
        """See `Setup`."""
        config = self.config
        return train_batches(
            self.dataset,
            seed=config.seed,
            batch=config.batch,
            start=start,
            rows=self.own_rows,
            vocab_size=self.tokenizer.vocab_size,
            on_bad=config.on_bad_record,
            leave_out=config.leave_out,
            dtype=id_dtype(self.step.model.vocab_size),
        )

    def begun(self, manifest: Manifest) -> tuple[Manifest, str]:
        """See `Setup`."""
        if not self.source:
            return (
                manifest,
                f"starting a new run in {self.out} from random parameters (seed {self.config.seed})",
            )
        step_dir, old, _ = self.source
        entry = {"operation": "init_from", "path": str(step_dir), "step": old.step, "tokens": old.tokens}
        began = dataclasses.replace(manifest, lineage=[*old.lineage, entry], chat_template=old.chat_template)
        return began, f"starting a new run in {self.out} from the parameters of {step_dir}"

    def require_same_source(self, old: Manifest) -> None:
        """See `Setup`: whatever --init-from says, a run resumes from its own checkpoints."""

    def commands(self) -> str:
        """See `Setup`."""
        return next_commands(self.out, self.config, self.steps, self.end)


def prepare_run(config: RunConfig) -> Pretraining:
    """Settings, data and devices of a run; what cannot be is refused before the data is prepared."""
    out = config.out or Path("runs") / config.preset
    begin(config)
    require_folder(out)
    if config.init_from:
        require_kind(config.init_from, "start", Kind.CHECKPOINT)
    model_config(config, vocab_size=1)
    shape, kernels, console = find_devices(config, out)

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
    before = trained_before(config, out)
    steps = count_steps(config, dataset, before)
    config, of_rate = with_rate(config, model, steps)

    # Devices, and what will compute on them.
    mesh = make_mesh(shape)
    config, step, attention = settle(config, model, mesh, kernels, tokenizer)
    about = [*pretraining_rows(config, model, dataset, steps, before), *of_rate]
    table = describe(config, model, about, mesh, step.compute, attention, kernels, config.document_mask)
    table.print(console)
    say_notes(config, model, steps, shape, out, console)

    # What the run starts from is opened before its folder is made, so that a refusal leaves nothing behind.
    record = run_record(without_process(config), model, steps, dataset.tokenizer_record, data_record(dataset))
    source = None
    if config.init_from and not config.show_sharding and not list_steps(out / "checkpoints"):
        with Activity(f"opening {config.init_from}", console=console):
            source = open_source(config.init_from, step, record, mesh)
    return Pretraining(
        config=config, out=out, tokenizer=tokenizer, prompts=prompts, steps=steps, mesh=mesh, step=step,
        record=record, source=source, console=console, dataset=dataset,
    )  # fmt: skip


def begin(config: JaxSettings) -> None:
    """What comes before JAX finds its devices; joins the other processes."""
    if config.deterministic:
        require_deterministic_operations()
    require_free_memory()
    processes.join(config.coordinator, config.num_processes, config.process_id)
    refuse_single_process_options(config)
    keep_compiled()


def find_devices(config: JaxSettings, out: Path) -> tuple[MeshShape, KernelsChoice, Console]:
    """The mesh over the devices, the CUDA kernels for them, and where this process prints.

    Raises:
        UserError: --mesh does not fit them, or there are no kernels where they are asked for.
    """
    with Activity("finding the devices"):
        shape = mesh_shape(config, out)
    kernels = choose_kernels(config.kernels, jax.local_devices()[0])
    return shape, kernels, make_console(quiet=not processes.is_first())


def say_notes(
    config: JaxSettings, model: ModelConfig, steps: int, shape: MeshShape, out: Path, console: Console
) -> None:
    """Prints what one might not expect of these settings."""
    notes = (check_room(config.optim, steps), describe_dtype(config.dtype, out))
    for note in (*notes, describe_replication(model, shape)):
        if note:
            console.print(f"note: {note}", highlight=False)


def without_process(config: JaxSettings) -> JaxSettings:
    """The settings as a run records them, whichever process it is."""
    return dataclasses.replace(config, coordinator=None, num_processes=None, process_id=None)


def settle(
    config: JaxSettings, model: ModelConfig, mesh: Mesh, kernels: KernelsChoice, tokenizer: Tokenizer
) -> tuple[Any, StepConfig, Choice]:
    """The settings with what they stand for on the devices of `mesh`, the step that is compiled for them, and
    its attention."""
    config = dataclasses.replace(config, grad_accum_steps=split_batch(config, model, mesh))
    shape = MeshShape(**mesh.shape)
    check_mesh(model, shape, config.batch, config.grad_accum_steps)
    step, attention = choose_step(config, model, mesh, kernels.kernels)
    if config.document_mask:
        step = dataclasses.replace(step, documents=document_mark(tokenizer))
    return dataclasses.replace(config, dtype=step.compute.dtype), step, attention


def refuse_single_process_options(config: JaxSettings) -> None:
    """Refuses options that need a single process, where there are several."""
    for flag, given, instead in (
        ("--eval-tasks", config.eval_tasks, "leave it out, and evaluate with eval.run"),
        ("--fallback", config.fallback, "give --from-step N, the newest step that is intact"),
    ):
        if given and processes.are_several():
            raise UserError(f"{flag} cannot be used with several processes: {instead}, or use one process")


def mesh_shape(config: JaxSettings, out: Path) -> MeshShape:
    """The mesh over the devices found; a UserError if --mesh does not fit them."""
    n_devices = jax.device_count()
    saved = begun_record(out)
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
    return Source(step_dir, manifest, restore_params(step_dir, abstract_model(step, mesh)))


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
