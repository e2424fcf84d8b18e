"""A training run of JAX, from its `Setup` to its exit code: folder, state, compilation, loop, result."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from core import processes
from core.checkpoint.checkpointer import Checkpointer, restore
from core.checkpoint.manifest import Manifest, load_manifest
from core.compilation_cache import programs_found
from core.errors import UserError
from core.extras import install_command
from core.folder_kinds import stale_model
from core.generation import Generator
from core.progress import Activity
from core.run.curve import plot_curve
from core.run.folder import check_run_folder, hold_folder, write_config
from core.run.guard import changed_measure
from core.run.interrupt import EXIT_FINISHED, Interrupt
from core.run.log import SAMPLES
from core.run.training_run import run_loop
from core.sharding import MeshShape, place, resolved_mesh, state_shardings
from train_tpu.engine import JaxEngine
from train_tpu.evaluate import Evaluator
from train_tpu.lora import AdaptedState
from train_tpu.oom_hints import out_of_memory_explained
from train_tpu.report import describe_layout, memory
from train_tpu.setup import Setup
from train_tpu.step import (
    TrainState,
    abstract_model,
    abstract_state,
    compile_step,
    emptied,
    fresh_state,
    init_state,
)


def run(setup: Setup, report: bool = True) -> int:
    """Trains; returns the exit code, which core.run.interrupt explains. report: say what one does next."""
    config, console, mesh = setup.config, setup.console, setup.mesh
    if config.show_sharding:
        describe_layout(abstract_state(setup.step, mesh), mesh).print(console)
        return EXIT_FINISHED
    say = functools.partial(console.print, highlight=False)
    with contextlib.ExitStack() as stack:
        tasks = open_tasks(setup)
        if tasks:
            stack.enter_context(tasks)
        enter_folder(setup, stack, say)
        interrupt = stack.enter_context(Interrupt())
        with Activity("making the state to start from", console=console):
            state, manifest, how = starting_state(setup)
        say(how)
        if done := nothing_to_do(setup, manifest.step):
            console.print(done)
            return EXIT_FINISHED
        setup.require_profile(manifest.step)
        if processes.is_first():
            setup.tokenizer.carry(setup.out)
            write_config(setup.out, setup.record)
        checkpointer = stack.enter_context(Checkpointer(setup.checkpoints, config.keep))
        engine = make_engine(setup, state, tasks, checkpointer)
        stack.enter_context(engine.compilations)
        batches = setup.open_batches(manifest.sequences)
        stack.callback(batches.close)
        with out_of_memory_explained(config.batch, config.grad_accum_steps):
            code = run_loop(
                setup,
                engine,
                batches,
                manifest,
                interrupt=interrupt,
                console=console,
                first=processes.is_first(),
                how=how,
                mesh=str(MeshShape(**mesh.shape)),
                processes=jax.process_count(),
            )
    if report and code == EXIT_FINISHED and processes.is_first():
        report_end(setup)
    return code


def enter_folder(setup: Setup, stack: contextlib.ExitStack, say: Callable[[str], None]) -> None:
    """Makes the run folder or checks the one to resume, and holds it as long as the stack is open."""
    out = setup.out
    processes.require_equal(f"{out} {setup.record}", "settings or data")
    processes.require_equal(str(setup.step.compute.kernels is None), "kernels")
    if processes.is_first():
        stack.enter_context(hold_folder(out, say))
        here = functools.partial(resolved_mesh, n_devices=jax.device_count())
        check_run_folder(out, setup.record, setup.config.allow_change, setup.defaults, mesh=here)
    processes.require_shared(out.absolute())


def nothing_to_do(setup: Setup, step: int) -> str | None:
    """What to say of a run that has made all its updates; None where some are left. See `is_finished`."""
    out, steps = setup.out, setup.steps
    if setup.is_finished(step):
        return f"{out} has finished ({step} of {steps} steps): start a new run with another --out"
    if setup.end < steps and step >= setup.end:
        return (
            f"{out} is already at step {step} (--stop-at {setup.end}): drop --stop-at to continue to step "
            f"{steps}"
        )
    return None


def make_engine(setup: Setup, state: TrainState, tasks: Any, checkpointer: Checkpointer) -> JaxEngine:
    """Compiles the step, once."""
    config, step, mesh, model = setup.config, setup.step, setup.mesh, setup.step.model
    started, found_before = time.monotonic(), programs_found()
    with (
        Activity("compiling the step", console=setup.console),
        out_of_memory_explained(config.batch, config.grad_accum_steps),
    ):
        compiled = compile_step(step, config.batch, config.grad_accum_steps, mesh)
    kept = " (kept from an earlier start)" if programs_found() > found_before else ""
    seconds = time.monotonic() - started
    setup.console.print(f"compiled the step in {seconds:.1f} s{kept}; it needs {memory(compiled)} per device")
    rows = config.batch // config.grad_accum_steps
    evaluator = Evaluator(model, step.compute, setup.heldout, rows, step.loss_chunk, mesh)
    sampling = dataclasses.replace(step.compute, mesh=None, attention="xla", kernels=None)
    generator = Generator(model, sampling)
    return JaxEngine(
        config, mesh, state, compiled, evaluator, tasks, generator, checkpointer, step, *setup.frozen
    )


def report_end(setup: Setup) -> None:
    """Says where the results of a finished run are, and what one does next."""
    out, console = setup.out, setup.console
    samples = f"; samples: {out / SAMPLES}" if (out / SAMPLES).exists() else ""
    console.print(f"loss curve: {plot_curve(out)}{samples}", highlight=False)
    if stale := stale_model(out):
        console.print(f"note: {stale}", highlight=False, soft_wrap=True)
    console.print(setup.commands(), highlight=False, soft_wrap=True)


def open_tasks(setup: Setup) -> Any:
    """What evaluates --eval-tasks; None without: training needs the package eval only then."""
    config = setup.config
    if not config.eval_tasks:
        return None
    try:
        from eval.training import TaskEvaluator, flax_backend
    except ImportError as error:
        raise UserError(f"--eval-tasks needs lm-eval ({error}): {install_command('eval')}") from None
    scorer = flax_backend(setup.step.model, setup.step.compute.dtype)
    return TaskEvaluator(config.eval_tasks, config.eval_data_dir, setup.tokenizer, scorer)


def starting_state(setup: Setup) -> tuple[TrainState, Manifest, str]:
    """The state to start from: resumed, made of another checkpoint's parameters, or fresh. With its manifest
    (and so its counters), and in words where it comes from."""
    manifest = setup.new_manifest()
    say = functools.partial(setup.console.print, highlight=False)
    step_dir = setup.find_start(processes, say)
    if step_dir:
        old = load_manifest(step_dir)
        setup.require_same_source(old)
        state, changed = saved_state(setup, step_dir)
        if processes.is_first():
            setup.leave_newer(say)
        manifest = setup.resume(manifest, old)
        grown = old.last_growth
        how = setup.how_resumed(old, manifest)
        if grown and grown["step"] == old.step:
            how += f", grown here from {grown['layers'][0]} to {grown['layers'][1]} layers ({grown['plan']})"
        if changed:
            how += f"; the guard starts anew, for other {' and '.join(changed)}"
        return state, manifest, how
    return new_state(setup), *setup.begun(manifest)


def saved_state(setup: Setup, step_dir: Path) -> tuple[TrainState, list[str]]:
    """The state of a checkpoint of this run, to resume from; and the changed settings that emptied its
    guard."""
    old, state = load_manifest(step_dir), restore_state(setup, step_dir)
    # A run that the guard halted resumes after the batches that halted it.
    streak = place(np.int32(0), state.guard.streak.sharding)
    state = state._replace(guard=state.guard._replace(streak=streak))
    changed = changed_measure(old, setup.new_manifest())
    return (state._replace(guard=emptied(state.guard)) if changed else state), changed


def restore_state(setup: Setup, step_dir: Path) -> TrainState:
    """The state in a checkpoint of this run; of adapters, without the model that they make."""
    state = abstract_state(setup.step, setup.mesh)
    if setup.step.lora is None:
        return restore(step_dir, state)
    whole = restore(step_dir, AdaptedState(abstract_model(setup.step, setup.mesh), *state))
    return TrainState(whole.adapters, whole.opt_state, whole.guard)


def new_state(setup: Setup) -> TrainState:
    """The state that a run begins with: of the parameters of another checkpoint, or random; of new
    adapters."""
    if not setup.source or setup.step.lora is not None:
        return fresh_state(setup.step, setup.mesh, setup.config.seed)
    return jax.jit(
        functools.partial(init_state, setup.step),
        out_shardings=state_shardings(setup.mesh, abstract_state(setup.step, setup.mesh)),
        donate_argnums=0,
    )(setup.source.params)
