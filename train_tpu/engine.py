"""The engine of JAX: the compiled step and its state, for the loop in core/run/loop.py."""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from core.checkpoint.checkpointer import Checkpointer
from core.checkpoint.manifest import Manifest
from core.data.batches import Batch as LoadedBatch
from core.data.sequences import Batch as PackedBatch
from core.errors import UserError
from core.generation import Generator
from core.model import Params
from core.processes import any_of, are_several, broadcast, is_first
from core.run.cadence import NO_FLAGS, Flags
from core.run.engine import Device, Metrics, News, TaskScore
from core.run.guard import GuardConfig
from core.run.metrics import Score
from core.run.profiling import Operation
from core.sampling import Sampling
from core.sharding import batch_sharding, local_rows, place, place_rows, replicated
from train_tpu.config import JaxSettings
from train_tpu.evaluate import Evaluator
from train_tpu.lora import AdaptedState, merged
from train_tpu.profile import start_trace, stop_trace
from train_tpu.recompilation import Compilation, Compilations, differences
from train_tpu.step import Batch, Controls, StepConfig, TrainState, abstract_inputs, abstract_model, lower_for
from train_tpu.step import Metrics as StepMetrics
from train_tpu.watch import record_of

AGREE_EVERY = 10  # updates after which several processes ask each other whether to stop or to save


class JaxEngine:
    """A `core.run.engine.Engine`. `state` is always the newest; the step donates the one before."""

    def __init__(
        self,
        config: JaxSettings,
        mesh: Mesh,
        state: TrainState,
        step: jax.stages.Compiled,
        evaluator: Evaluator,
        tasks: Any,
        generator: Generator,
        checkpointer: Checkpointer,
        config_of_step: StepConfig | None = None,
        *frozen: Params,
    ):
        """tasks: an eval.training.TaskEvaluator; None where no tasks are evaluated.

        config_of_step: what `step` was compiled from, to compile it again if its inputs change; None: then
            they are refused.
        frozen: the model's parameters, where those of the state are adapters.
        """
        self.state = state
        self.alone, self.lag = not are_several(), 1
        self.device = Device(mesh.devices.flat[0].device_kind, mesh.size)
        self.heldout: Sequence[str] = list(evaluator.heldout)
        self._config, self._mesh, self._step, self._frozen = config, mesh, step, frozen
        self._evaluator, self._tasks, self._generator = evaluator, tasks, generator
        self._checkpointer, self._config_of_step = checkpointer, config_of_step
        self.compilations = Compilations()
        """To be entered by whoever wants to hear of them."""
        self._unexpected: list[Compilation] = []  # those that updates needed
        self._expected: tuple[Any, ...] | None = None  # inputs of a step that was compiled again

    @property
    def params(self) -> Params:
        """The model's parameters, adapters merged into them."""
        if not self._frozen:
            return self.state.params
        return _merged(self._config_of_step, self._mesh)(*self._frozen, self.state.params)

    def agree(self, step: int, flags: Flags, now: bool = False) -> Flags:
        """See `Engine`: by an exchange every `AGREE_EVERY` updates."""
        if self.alone or now or step % AGREE_EVERY == 0:
            return Flags(*any_of(*flags))
        return NO_FLAGS

    def share(self, text: str) -> str:
        """See `Engine`."""
        return broadcast(text)

    def dispatch(self, batch: LoadedBatch, step: int, lr: float, guard: GuardConfig) -> StepMetrics:
        """See `Engine`."""
        self._forbid(self._unexpected)
        self.compilations.in_update = True
        try:
            return self._dispatch(batch, step, lr, guard)
        finally:
            self.compilations.in_update = False

    def _dispatch(self, batch: LoadedBatch, step: int, lr: float, guard: GuardConfig) -> StepMetrics:
        config, whole = self._config, replicated(self._mesh)
        watched = config.watch_every > 0 and step % config.watch_every == 0
        controls = Controls(
            lr=np.float32(lr),
            sigma=np.float32(guard.sigma),
            halt_after=np.int32(guard.halt_after),
            seed=np.uint32(config.seed),
            watch=np.bool_(watched) if config.watch_every else None,
        )
        placed = place_batch(batch, config.batch, config.grad_accum_steps, self._mesh)
        controls = jax.tree.map(lambda value: place(value, whole), controls)
        try:
            self.state, metrics = self._run_step(placed, controls)
        except (TypeError, ValueError):  # before anything is computed or donated
            inputs = (self.state, placed, controls, *self._frozen)
            if not (found := self._changed_inputs(*inputs)):
                raise
            self._compile_again(found, *inputs)
            self.state, metrics = self._run_step(placed, controls)
        return metrics if watched else metrics._replace(seen=None)

    def read(self, pending: StepMetrics) -> Metrics:
        """See `Engine`."""
        with jax.transfer_guard("disallow"):
            found = jax.device_get(pending)
        return Metrics(
            loss=float(found.loss),
            nll=float(found.nll),
            grad_norm=float(found.grad_norm),
            applied=bool(found.applied),
            streak=int(found.streak),
            skipped=int(found.skipped),
            leaf_norms=found.leaf_norms,
            watched=found.seen and self._record(found),
        )

    def _record(self, found: StepMetrics) -> dict[str, Any]:
        """What was seen of a watched update, as it is logged."""
        model, rows = self._config_of_step.model, self._config.batch // self._config.grad_accum_steps
        return record_of(found.seen, found.leaf_norms, rows, model.context, model.d_model)

    def _run_step(self, batch: Batch, controls: Controls) -> tuple[TrainState, StepMetrics]:
        with jax.transfer_guard("disallow"):  # what the step takes lies on the devices already
            return self._step(self.state, batch, controls, *self._frozen)

    def _changed_inputs(self, *inputs: Any) -> list[str]:
        """Which inputs of the step are not those that it was compiled for; none where that is not known."""
        step, config = self._config_of_step, self._config
        if step is None:
            return []
        expected = self._expected or abstract_inputs(step, config.batch, config.grad_accum_steps, self._mesh)
        names = ("state", "batch", "controls", "frozen")[: len(inputs)]
        return differences(dict(zip(names, expected, strict=True)), dict(zip(names, inputs, strict=True)))

    def _compile_again(self, found: list[str], *inputs: Any) -> None:
        shown = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
        self._forbid([Compilation("train_step", 0.0, shown, in_update=True)])
        begun = time.monotonic()
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), inputs
        )
        lowered = lower_for(self._config_of_step, self._mesh, *abstract)
        self._step = lowered.compile(compiler_options=dict(self._config_of_step.compiler_options))
        self._expected = abstract
        self.compilations.add(Compilation("train_step", time.monotonic() - begun, shown, in_update=True))

    def _forbid(self, found: Sequence[Compilation]) -> None:
        """Ends the run if an update needed compilations and --no-recompile forbids them."""
        if self._config.recompile:
            return
        for one in found:
            raise UserError(
                f"an update needs {one.function} compiled again ({one.changed or 'first use'}): find what "
                "changes it, or leave out --no-recompile"
            )

    def news(self) -> list[News]:
        """See `Engine`: from the first update on."""
        self.compilations.begin()
        taken = self.compilations.take()
        self._unexpected += [one for one in taken if one.in_update]
        return [News(str(one), one.in_update) for one in taken]

    def score(self, split: str, limit: int | None, stop: Callable[[], bool]) -> Score | None:
        """See `Engine`."""
        return self._evaluator.score(self.params, split, limit, stop)

    def evaluate_tasks(
        self, limit: int | None, stop: Callable[[], bool], say: Callable[[str], None]
    ) -> Iterable[TaskScore]:
        """See `Engine`."""
        return self._tasks.evaluate(self.params, limit, stop, say) if self._tasks else ()

    def sample(
        self, prompts: list[list[int]], sampling: Sampling, n: int, eos: int
    ) -> list[list[int]] | None:
        """See `Engine`."""
        params = self.params
        if not self.alone:
            params = own_copy(params, self._mesh)
            if not is_first():
                return None
        return self._generator.complete(params, prompts, sampling, n, eos)

    def start_profile(self, folder: Path) -> None:
        """See `Engine`."""
        self._traced = folder
        if is_first():
            start_trace(folder)

    def stop_profile(self) -> list[Operation]:
        """See `Engine`."""
        return stop_trace(self._traced, self._step.as_text()) if is_first() else []

    def save(self, manifest: Manifest) -> None:
        """See `Engine`: in the background."""
        state = AdaptedState(self.params, *self.state) if self._frozen else self.state
        self._checkpointer.save(manifest.step, state, manifest)

    def wait(self) -> None:
        """See `Engine`."""
        self._checkpointer.wait()


def own_copy(params: Params, mesh: Mesh) -> Params:
    """The whole parameters on one device of this process; every process must ask."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), _whole(mesh)(params))


@functools.cache
def _whole(mesh: Mesh) -> Callable[[Params], Params]:
    """One function for a mesh, so that it is compiled once."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


@functools.cache
def _merged(step: StepConfig, mesh: Mesh) -> Callable[[Params, Params], Params]:
    """One function for a run, so that it is compiled once."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_model(step, mesh))
    return jax.jit(functools.partial(merged, step.lora, step.model), out_shardings=shardings)


def own_rows(batch: int, grad_accum_steps: int, mesh: Mesh) -> np.ndarray:
    """[grad_accum_steps, n]: the rows of a global batch for this process's devices; alone, all of them."""
    rows = batch // grad_accum_steps
    return np.arange(grad_accum_steps)[:, None] * rows + local_rows(
        batch_sharding(mesh), grad_accum_steps, rows
    )


def place_batch(loaded: LoadedBatch | PackedBatch, batch: int, grad_accum_steps: int, mesh: Mesh) -> Batch:
    """This process's rows of a global batch of `batch` as the step takes them: cut into micro-batches,
    spread over the devices."""
    own = own_rows(batch, grad_accum_steps, mesh)

    def placed(values: np.ndarray) -> jax.Array:
        cut = values.reshape(*own.shape, *values.shape[1:])
        return place_rows(cut, own[0], batch // grad_accum_steps, batch_sharding(mesh))

    index = (loaded.first + own.ravel()).astype(np.uint32)
    if isinstance(loaded, PackedBatch):
        rows = loaded.rows
        of_places = (placed(rows.targets), placed(rows.documents))
        return Batch(placed(rows.tokens), placed(loaded.bad), placed(index), *of_places)
    return Batch(placed(loaded.tokens), placed(loaded.bad), placed(index))
