"""`python -m train_tpu.run`: train a model from scratch, or go on with a run.

main() is the whole course in order: settings, data, devices, run folder, state, compilation, loop.
"""

import contextlib
import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from core import cli, processes
from core.checkpoint.checkpointer import (
    Checkpointer,
    find_step,
    list_steps,
    restore,
    restore_params,
)
from core.checkpoint.manifest import Manifest, load_manifest
from core.checkpoint.steps import find_start, leave_newer
from core.compilation_cache import keep_compiled, programs_found
from core.config import ModelConfig, training_flags
from core.data.dataset import Dataset, train_batches
from core.data.prepare import choose_tokenizer, open_or_prepare
from core.errors import UserError, run_command
from core.extras import install_command
from core.folder_kinds import Kind, require_kind
from core.folders import CACHE
from core.generation import Generator
from core.gpu_memory import require_free_memory
from core.model import Compute, Params, compute_dtype
from core.run.curve import plot_curve
from core.run.folder import (
    check_run_folder,
    lock_folder,
    read_config,
    require_folder,
    run_record,
    settings_of_run,
    write_config,
)
from core.run.guard import changed_measure
from core.run.interrupt import EXIT_FINISHED, Interrupt
from core.run.log import SAMPLES, NoLog, RunLog, read_log
from core.run.loop import END, Loop
from core.run.presets import TRAINING_DEFAULTS, count_steps, for_help
from core.run.progress import Progress, make_console
from core.run.schedule import check_room, require_continuous
from core.run.settings import given_value, model_config
from core.sampling import require_room
from core.sharding import (
    MeshShape,
    check_mesh,
    make_mesh,
    parse_mesh,
    require_deterministic_operations,
    resolved_mesh,
    state_shardings,
)
from core.tokenizer import Tokenizer
from core.tokenizer import require_same as require_same_tokenizer
from train_tpu.backend import choose_step, split_batch
from train_tpu.config import RunConfig, defaults
from train_tpu.engine import JaxEngine, own_rows
from train_tpu.evaluate import Evaluator
from train_tpu.oom_hints import out_of_memory_explained
from train_tpu.report import describe, describe_layout, memory, next_commands
from train_tpu.step import (
    StepConfig,
    TrainState,
    abstract_state,
    compile_step,
    emptied,
    fresh_state,
    init_state,
)


def main() -> int:
    """Runs the command; returns its exit code (core.run.interrupt says what each means)."""
    # 1. Settings: those of the run in --out, or the preset's own, so that --help shows them; over them what
    # the command line says.
    config = parse(sys.argv[1:])
    out = config.out or Path("runs") / config.preset
    if config.deterministic:
        require_deterministic_operations()
    require_free_memory()
    processes.join(config.coordinator, config.num_processes, config.process_id)
    refuse_alone(config)
    keep_compiled()
    # What cannot be is refused before the data is prepared.
    require_folder(out)
    if config.init_from:
        require_kind(config.init_from, "start", Kind.JAX)
    model_config(config, vocab_size=1)
    shape = mesh_shape(config, out)
    console = make_console(quiet=not processes.is_first())

    # 2. Data and tokenizer.
    given = TRAINING_DEFAULTS[config.preset]
    tokenizer = choose_tokenizer(config.tokenizer, config.data, given["tokenizer"])
    model = model_config(config, tokenizer.vocab_size)
    prompts = [tokenizer.begin(prompt) for prompt in config.prompts]
    if prompts:
        require_room(prompts, model.context)
    dataset = processes.in_turn(lambda: open_or_prepare(config.data, tokenizer.name, model.context, CACHE))
    steps = count_steps(config, dataset)

    # 3. Devices, and what will compute on them.
    mesh = make_mesh(shape)
    config = dataclasses.replace(config, accumulate=split_batch(config, model, mesh))
    check_mesh(model, shape, config.batch, config.accumulate)
    step_config, attention = choose_step(config, model, mesh)
    compute = step_config.compute
    config = dataclasses.replace(config, dtype=compute.dtype)  # recorded as what it stands for here
    console.print(describe(config, model, dataset, steps, mesh, compute, attention))
    for note in (check_room(config.optim, steps), describe_dtype(compute.dtype, out)):
        if note:
            console.print(f"note: {note}", markup=False, highlight=False)
    if config.show_sharding:
        console.print(describe_layout(abstract_state(step_config, mesh), mesh))
        return EXIT_FINISHED

    tasks = open_tasks(config, model, compute, tokenizer)

    # 4. The run folder: new, or that of the run to go on with. What it starts from is opened first, so that
    # a refusal leaves nothing behind.
    alone = dataclasses.replace(config, coordinator=None, num_processes=None, process_id=None)
    record = run_record(alone, model, steps, dataset.tokenizer_record, dataset.fingerprint)
    source = None
    if config.init_from and not list_steps(out / "checkpoints"):
        source = open_source(config.init_from, step_config, record, mesh)
    processes.require_equal(f"{out} {record}", "settings or data")
    lock = contextlib.nullcontext()
    if processes.is_first():
        lock = lock_folder(out)
        check_run_folder(
            out,
            record,
            config.allow_change,
            RunConfig(),
            mesh=lambda text: resolved_mesh(text, jax.device_count()),
        )
    processes.require_shared(out.absolute())
    end = steps if config.stop_at is None else min(steps, config.stop_at)

    with Interrupt() as interrupt, tasks or contextlib.nullcontext():
        # 5. The state: resumed, taken from another checkpoint's parameters, or fresh.
        state, manifest, how = starting_state(
            config, step_config, out, record, dataset, mesh, source, console
        )
        console.print(how, markup=False, highlight=False)
        if manifest.step > steps:
            raise UserError(
                f"the run in {out} is at step {manifest.step} already, beyond the {steps} steps asked for: "
                "resume it without them, or give another --out"
            )
        if manifest.step == steps and any(row["what"] == END for row in read_log(out, "event")):
            console.print(
                f"the run in {out} is finished ({manifest.step} of {steps} steps): start a new one with "
                "another --out"
            )
            return EXIT_FINISHED
        if end < steps and manifest.step >= end:
            console.print(
                f"{out} is already at step {manifest.step} (--stop-at {end}): drop --stop-at to continue to "
                f"step {steps}"
            )
            return EXIT_FINISHED

        if processes.is_first():
            tokenizer.carry(out)
            write_config(out, record)

        checkpointer = Checkpointer(out / "checkpoints", config.keep)

        # 6. Compilation, once.
        started, found_before = time.monotonic(), programs_found()
        with out_of_memory_explained(config.batch, config.accumulate):
            step = compile_step(step_config, config.batch, config.accumulate, mesh)
        kept = " (kept from an earlier start)" if programs_found() > found_before else ""
        console.print(
            f"compiled the step in {time.monotonic() - started:.1f} s{kept}; it needs {memory(step)} a device"
        )

        # 7. The loop.
        batches = train_batches(
            dataset, seed=config.seed, batch=config.batch, start=manifest.sequences,
            rows=own_rows(config.batch, config.accumulate, mesh).ravel().tolist(),
            vocab_size=model.vocab_size, on_bad=config.on_bad_record,
        )  # fmt: skip
        rows = config.batch // config.accumulate
        log = RunLog(out, manifest.step) if processes.is_first() else NoLog()
        if log.notice:
            console.print(log.notice, markup=False, highlight=False)
        log.write(manifest.step, "event", what=how, device=mesh.devices.flat[0].device_kind, n=mesh.size)
        progress = Progress(console, end, manifest.step, config.log_every)
        try:
            with out_of_memory_explained(config.batch, config.accumulate):
                engine = JaxEngine(
                    config,
                    mesh,
                    state,
                    step,
                    Evaluator(model, compute, dataset, rows, step_config.loss_chunk, mesh),
                    tasks,
                    Generator(model, dataclasses.replace(compute, mesh=None, attention="xla")),
                    checkpointer,
                )
                code = Loop(
                    settings=config,
                    engine=engine,
                    batches=batches,
                    manifest=manifest,
                    checkpoints=checkpointer.folder,
                    steps=steps,
                    end=end,
                    prompts=prompts,
                    tokenizer=tokenizer,
                    log=log,
                    progress=progress,
                    interrupt=interrupt,
                ).run()
        finally:
            progress.close()
            log.close()
            batches.close()
            checkpointer.close()
            lock.__exit__(None, None, None)
    if code == EXIT_FINISHED and processes.is_first():
        samples = f"; samples: {out / SAMPLES}" if (out / SAMPLES).exists() else ""
        console.print(f"loss curve: {plot_curve(out)}{samples}", highlight=False)
        console.print(next_commands(out, config, steps, end), highlight=False, markup=False, soft_wrap=True)
    return code


def refuse_alone(config: RunConfig) -> None:
    """Refuses what only a process that is alone can do."""
    for flag, given in (("--eval-tasks", config.eval_tasks), ("--fallback", config.fallback)):
        if given and processes.are_several():
            raise UserError(f"{flag} cannot be used with several processes: leave it out, or use one process")


def mesh_shape(config: RunConfig, out: Path) -> MeshShape:
    """The mesh of the devices that there are; a UserError where the settings' does not fit them."""
    n_devices = jax.device_count()
    saved = read_config(out)
    if saved and config.mesh and saved["run"].get("mesh") == config.mesh:
        try:
            return parse_mesh(config.mesh, n_devices)
        except UserError:
            raise UserError(
                f"the run in {out} is for --mesh {config.mesh}, and the devices here are {n_devices}: give "
                f"--mesh {MeshShape(data=n_devices)} --allow-change mesh to resume it here"
            ) from None
    return parse_mesh(config.mesh, n_devices)


def parse(argv: list[str]) -> RunConfig:
    """The command line over the settings of the run in its --out, else over its preset's defaults."""
    preset, out = given_value(argv, "--preset") or RunConfig.preset, given_value(argv, "--out")
    folder = Path(out) if out else Path("runs") / preset
    default = for_help(settings_of_run(folder, defaults(preset), argv), argv)
    return cli.parse(
        RunConfig, argv, prog="python -m train_tpu.run", default=default, description=RunConfig.__doc__
    )


def describe_dtype(dtype: str, out: Path) -> str | None:
    """What to tell of a run that is resumed in another type than one started on this device would have."""
    here = compute_dtype("auto", jax.default_backend())
    if dtype == here or not list_steps(out / "checkpoints"):
        return None
    return (
        f"the run computes in {dtype}, as it was started; here a new one would in {here} "
        f"(--dtype {here} --allow-change dtype)"
    )


def open_tasks(config: RunConfig, model: ModelConfig, compute: Compute, tokenizer: Tokenizer) -> Any:
    """What evaluates --eval-tasks; None without: training needs the package eval only then."""
    if not config.eval_tasks:
        return None
    try:
        from eval.training import TaskEvaluator, flax_backend
    except ImportError as error:
        raise UserError(f"--eval-tasks needs lm-eval ({error}): {install_command('eval')}") from None
    scorer = flax_backend(model, compute.dtype)
    return TaskEvaluator(config.eval_tasks, config.eval_data_dir, tokenizer, scorer)


def open_source(
    path: Path, step_config: StepConfig, record: dict[str, Any], mesh: Mesh
) -> tuple[Path, Manifest, Params]:
    """The checkpoint that --init-from names, its manifest and its parameters."""
    step_dir = find_step(path)
    manifest = load_manifest(step_dir)
    require_same_tokenizer(manifest.tokenizer, record["tokenizer"], str(step_dir), "the data given")
    require_same_function(step_dir, ModelConfig(**manifest.config["model"]), step_config.model)
    return step_dir, manifest, restore_params(step_dir, abstract_state(step_config, mesh).params)


def require_same_function(step_dir: Path, saved: ModelConfig, model: ModelConfig) -> None:
    """Refuses to go on from parameters of another model; the context may differ where positions are rotary.

    Heads, theta and the like show in no shape, so the parameters would load and compute something else.
    """
    here = model.function()
    for name, there in saved.function().items():
        free = name == "context" and model.positions == saved.positions == "rope"
        if there != here[name] and not free:
            raise UserError(
                f"{step_dir} is a model with {name} {there}, not {here[name]}: to start from it, give "
                f"{training_flags(saved)}"
            )


def starting_state(
    config: RunConfig,
    step_config: StepConfig,
    out: Path,
    record: dict[str, Any],
    dataset: Dataset,
    mesh: Mesh,
    source: tuple[Path, Manifest, Params] | None,
    console: Console,
) -> tuple[TrainState, Manifest, str]:
    """The state to go on from, its manifest (with its counters), and in words where it comes from."""
    abstract = abstract_state(step_config, mesh)
    manifest = Manifest(
        kind="train", step=0, sequences=0, tokens=0, config={k: record[k] for k in ("model", "run")},
        tokenizer=record["tokenizer"], data={"fingerprint": dataset.fingerprint, "cursor": 0},
    )  # fmt: skip
    folder = out / "checkpoints"
    say = functools.partial(console.print, markup=False, highlight=False)

    def check(start: Manifest) -> None:
        require_continuous(start.config["run"], record["run"], start.step, out)

    step_dir = processes.in_turn(lambda: find_start(folder, config.from_step, config.fallback, check, say))
    processes.require_equal(load_manifest(step_dir).to_json() if step_dir else "", f"checkpoint in {folder}")
    if step_dir:
        old = load_manifest(step_dir)
        state = restore(step_dir, abstract)
        if config.from_step is not None and processes.is_first():
            for left in leave_newer(folder, config.from_step):
                say(f"a newer checkpoint is left, as {left}")
        # A run that the guard halted goes on behind the batches that halted it.
        state = state._replace(guard=state.guard._replace(streak=jax.numpy.zeros_like(state.guard.streak)))
        changed = changed_measure(old, manifest)
        if changed:
            state = state._replace(guard=emptied(state.guard))
        manifest = manifest.resumed_from(old)
        grown = old.last_growth
        how = f"resuming {out} at step {old.step} ({old.sequences:,} sequences read)"
        if grown and grown["step"] == old.step:
            how += f", grown here from {grown['layers'][0]} to {grown['layers'][1]} layers ({grown['plan']})"
        if changed:
            how += f"; the guard starts anew, for other {' and '.join(changed)}"
        return state, manifest, how
    if source:
        step_dir, old, params = source
        state = jax.jit(
            functools.partial(init_state, step_config),
            out_shardings=state_shardings(mesh, abstract),
            donate_argnums=0,
        )(params)
        entry = {"operation": "init_from", "path": str(step_dir), "step": old.step, "tokens": old.tokens}
        manifest = dataclasses.replace(manifest, lineage=[*old.lineage, entry])
        return state, manifest, f"starting a new run in {out} from the parameters of {step_dir}"
    state = fresh_state(step_config, mesh, config.seed)
    return state, manifest, f"starting a new run in {out} from random parameters (seed {config.seed})"


def main_of_several() -> int:
    """`main`, for a process on which others may wait."""
    with processes.leaving_at_once():
        return main()


if __name__ == "__main__":
    run_command(main_of_several)
