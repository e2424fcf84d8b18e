"""The training loop: evaluate, sample and save before a step, so that first and last are measured alike.

The loop counts and schedules; every array operation is in the compiled step. Metrics are read one step
late, so that the device never waits for the host.
"""

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from core.checkpoint.checkpointer import Checkpointer
from core.checkpoint.manifest import Manifest
from core.data.dataset import Batch as LoadedBatch
from core.errors import UserError
from core.generation import Generator
from core.model import Params
from core.processes import age, any_of, are_several, is_first
from core.run.cadence import Agreement, Cadence, find_due, sample_length
from core.run.guard import Health
from core.run.interrupt import EXIT_FINISHED, EXIT_HALTED, EXIT_KEPT, EXIT_SAVED, Interrupt
from core.run.log import NoLog, RunLog
from core.run.metrics import model_flops_utilization
from core.run.progress import Progress
from core.run.schedule import learning_rate
from core.sampling import Sampling
from core.sharding import batch_sharding, local_rows, place, place_rows, replicated
from core.tokenizer import Tokenizer
from train_tpu.config import RunConfig
from train_tpu.evaluate import Evaluator
from train_tpu.step import Batch, Controls, Metrics, TrainState

AGREE_EVERY = 10  # updates after which several processes ask each other whether to stop or to save
METRICS_LAG = 1  # steps that may be under way while the metrics of the one before are read
END = "end"  # the event that a finished run logs last
HALT = "halt"  # that of one which the guard ended


class InFlight(NamedTuple):
    """A dispatched step whose metrics have not been read."""

    step: int
    batch: LoadedBatch
    lr: float
    metrics: Metrics


class Halted(Exception):
    """The guard has refused `halt_after` updates in a row."""


@dataclasses.dataclass
class Loop:
    """One run from `step` to `end`. `state` is always the newest; the step donates the one before."""

    config: RunConfig
    state: TrainState
    step: int
    """Updates made so far, skipped ones included."""
    steps: int
    """Updates that the schedule is for."""
    end: int
    """Updates after which to stop: `steps`, or fewer."""
    cursor: int
    """Training sequences read so far: the index of the next batch's first."""
    compiled_step: jax.stages.Compiled
    batches: Iterator[LoadedBatch]
    evaluator: Evaluator
    tasks: Any
    """An eval.training.TaskEvaluator; None where no tasks are evaluated."""
    generator: Generator
    tokenizer: Tokenizer
    checkpointer: Checkpointer
    manifest: Manifest
    """What every checkpoint's manifest says, but for the counters."""
    log: RunLog | NoLog
    progress: Progress
    interrupt: Interrupt
    mesh: Mesh
    cadence: Cadence
    flops_per_token: int

    def __post_init__(self) -> None:
        self._context = self.manifest.config["model"]["context"]
        self._first_step = self.step
        growth = self.manifest.last_growth
        self._grown_at = growth["step"] if growth else None
        self._saved_step = self.checkpointer.latest_committed
        self._in_flight: collections.deque[InFlight] = collections.deque()
        self._durations: collections.deque[float] = collections.deque(maxlen=20)
        self._clock = time.monotonic()
        self._agreement = Agreement(self.config.save_minutes, lambda: self.interrupt.requested is not None)
        self._health = Health(self.checkpointer.folder, self.manifest)
        self._aside = 0.0  # seconds spent on other things than updates

    @property
    def _stopping(self) -> bool:
        return self._agreement.stop or (not are_several() and self.interrupt.requested is not None)

    def _agree(self) -> None:
        if not are_several() or self.step % AGREE_EVERY == 0:
            self._agreement.hear(*any_of(*self._agreement.wishes()))

    def run(self) -> int:
        """Trains until done, interrupted or halted; returns the exit code. The newest state is saved."""
        try:
            while True:
                self._agree()
                if self._stopping:
                    break
                self._before_step()
                if self.step == self.end or self._stopping:
                    break
                self._dispatch()
                self._read_metrics(leave=METRICS_LAG)
            self._read_metrics(leave=0)
        except Halted as halted:
            self._save()
            self.checkpointer.wait()
            self.log.write(self.step, "event", what=HALT, why=str(halted))
            self.progress.say(f"halted: {halted}; {self._health.after_halt(self.step)}")
            return EXIT_HALTED
        if self.step == self.end and not self._stopping:
            self._save()
            self.checkpointer.wait()
            whole = self.end == self.steps
            self.log.write(self.step, "event", what=END if whole else f"stopped, as asked, of {self.steps}")
            return EXIT_FINISHED
        return self._stop_early()

    def _stop_early(self) -> int:
        started = self.step > self._first_step
        if started:
            self._save()
        self.checkpointer.wait()
        by = self.interrupt.requested or "another process"
        self.log.write(self.step, "event", what=f"interrupted by {by}")
        newest = self.checkpointer.latest_committed
        if started:
            self.progress.say(f"saved step {self.step}: the same command goes on from there")
            return EXIT_SAVED
        kept = "nothing to keep yet" if newest is None else f"step {newest} is kept"
        self.progress.say(f"no step was made since the start: {kept}; the same command goes on from there")
        return EXIT_KEPT

    def _before_step(self) -> None:
        step, last, grown = self.step, self.step == self.end, self.step == self._grown_at
        evaluate, sample, save = find_due(self.cadence, step, last, self._agreement.late)
        evaluate |= grown
        sample &= bool(self.config.prompts)
        save |= step > 0 and step in self.config.keep_steps
        if not (evaluate or sample or save):
            return
        self._read_metrics(leave=0)
        began = time.monotonic()
        if evaluate:
            self._evaluate(limit=None if last or grown else self.config.eval_windows)
            if self.tasks and not self._stopping:
                self._evaluate_tasks(limit=None if last else self.config.eval_questions)
        if sample and not self._stopping:
            self._sample()
        if save:
            self._save()
        self._clock = time.monotonic()
        self._aside += self._clock - began

    def _dispatch(self) -> None:
        try:
            loaded = next(self.batches)
        except UserError:  # a damaged record: what was learned until here is kept
            if not are_several():  # the others do not know of it, and saving is the work of all
                self._read_metrics(leave=0)
                self._save()
            raise
        if loaded.first != self.cursor:
            raise RuntimeError(f"the batch starts at {loaded.first}, the cursor is at {self.cursor}")
        rate = learning_rate(self.config.optim, self.step, self.steps)
        controls = Controls(
            lr=np.float32(rate),
            sigma=np.float32(self.config.guard.sigma),
            halt_after=np.int32(self.config.guard.halt_after),
            seed=np.uint32(self.config.seed),
        )
        batch = place_batch(loaded, self.config.batch, self.config.accumulate, self.mesh)
        controls = Controls(*(place(value, replicated(self.mesh)) for value in controls))
        self.state, metrics = self.compiled_step(self.state, batch, controls)
        self._in_flight.append(InFlight(self.step, loaded, rate, metrics))
        self.step += 1
        self.cursor += self.config.batch

    def _read_metrics(self, leave: int) -> None:
        while len(self._in_flight) > leave:
            done = self._in_flight.popleft()
            metrics: Metrics = jax.device_get(done.metrics)
            now = time.monotonic()
            self._durations.append(now - self._clock)
            self._clock = now
            if done.step == self._first_step:
                self._report_start()
            self._report(done, metrics)
            self._health.see(float(metrics.loss), int(metrics.streak))
            if metrics.streak >= self.config.guard.halt_after:
                self._in_flight.clear()  # they changed nothing: the graph stops applying by itself
                raise Halted(
                    f"{metrics.streak} updates in a row were not applied, the last at step {done.step} "
                    f"with loss {metrics.loss:.4g} and gradient norm {metrics.grad_norm:.4g}"
                )

    def _report_start(self) -> None:
        seconds = round(age(), 1)
        self.log.write(
            self._first_step, "event", what="first update", seconds=seconds, aside=round(self._aside, 1)
        )
        aside = f", {self._aside:.1f} s of them evaluating and sampling" if self._aside else ""
        self.progress.say(f"the first update was made {seconds} s after the start{aside}")

    def _report(self, done: InFlight, metrics: Metrics) -> None:
        seconds = sum(self._durations) / len(self._durations)
        rate = self.config.batch * self._context / seconds
        self.log.write(
            done.step,
            "train",
            tokens=done.batch.first * self._context,
            loss=float(metrics.loss),
            nll=float(metrics.nll),
            grad_norm=float(metrics.grad_norm),
            lr=done.lr,
            tokens_per_second=round(rate),
        )
        if not metrics.applied:
            self._report_skip(done, metrics)
        bad = done.batch.records[done.batch.bad]
        if len(bad):
            self.log.write(done.step, "event", what="damaged records left out", records=bad.tolist())
            self.progress.say(f"step {done.step}: left out damaged training records {bad.tolist()}")
        mfu = model_flops_utilization(
            rate, self.flops_per_token, jax.devices()[0].device_kind, self.mesh.size
        )
        self.progress.step(done.step, float(metrics.nll), done.lr, rate, mfu, seconds)

    def _report_skip(self, done: InFlight, metrics: Metrics) -> None:
        first, blame = done.batch.first, blame_leaves(metrics.leaf_norms)
        self.log.write(
            done.step,
            "skip",
            loss=float(metrics.loss),
            grad_norm=float(metrics.grad_norm),
            streak=int(metrics.streak),
            skipped=int(metrics.skipped),
            sequences=[first, first + self.config.batch],
            records=done.batch.records.tolist(),
            blame=blame,
        )
        self.progress.say(
            f"step {done.step}: update not applied: loss {metrics.loss:.4g}, gradient norm "
            f"{metrics.grad_norm:.4g}, from {', '.join(blame)}; sequences {first} to "
            f"{first + self.config.batch - 1} (records in metrics.jsonl); {metrics.skipped} so far"
        )

    def _evaluate(self, limit: int | None) -> None:
        for split in self.evaluator.dataset.heldout:
            score = self.evaluator.score(self.state.params, split, limit, lambda: self._stopping)
            if score is None:
                return
            tokens = self.cursor * self._context
            self.log.write(
                self.step, "eval", split=split, tokens=tokens, nll=score.nll, perplexity=score.perplexity,
                bits_per_byte=score.bits_per_byte, scored_tokens=score.tokens,
            )  # fmt: skip
            self.progress.say(
                f"step {self.step}: {split}: {score.bits_per_byte:.4f} bits per byte, "
                f"{score.nll:.4f} nats per token, perplexity {score.perplexity:.2f}"
            )

    def _evaluate_tasks(self, limit: int | None) -> None:
        for task, questions, figures in self.tasks.evaluate(self.state.params, limit, self.progress.say):
            values = {f"{task}/{name}": value for name, value, _ in figures}
            self.log.write(self.step, "task", task=task, questions=questions, **values)
            texts = [text for _, _, text in figures]
            self.progress.say(f"step {self.step}: {task}: {', '.join(texts)} ({questions:,} questions)")

    def _sample(self) -> None:
        """Goes on from fixed prompts with fixed keys: what changes is the model."""
        prompts = [self.tokenizer.begin(text) for text in self.config.prompts]
        params = self.state.params
        if are_several():
            params = own_copy(params, self.mesh)
            if not is_first():
                return
        made = self.generator.complete(
            params, prompts, Sampling(seed=self.config.seed), sample_length(self.step), self.tokenizer.eos
        )
        texts = [self.tokenizer.decode([*p, *new]) for p, new in zip(prompts, made, strict=True)]
        self.log.sample(self.step, texts)
        self.progress.say("\n".join(f"  | {' '.join(text.split())}" for text in texts[:2]))

    def _save(self) -> None:
        if self._saved_step == self.step:
            return
        manifest = dataclasses.replace(
            self.manifest,
            step=self.step,
            sequences=self.cursor,
            tokens=self.cursor * self._context,
            data={**self.manifest.data, "cursor": self.cursor},
            health=self._health.record(),
        )
        self.checkpointer.save(self.step, self.state, manifest)
        self._saved_step = self.step
        self._agreement.saved()


def own_copy(params: Params, mesh: Mesh) -> Params:
    """The whole parameters on one device of this process; every process must ask."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), _whole(mesh)(params))


@functools.cache
def _whole(mesh: Mesh) -> Callable[[Params], Params]:
    """One function for a mesh, so that it is compiled once."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def own_rows(batch: int, accumulate: int, mesh: Mesh) -> np.ndarray:
    """[accumulate, n]: the rows of a global batch that this process's devices work on; alone, all of them."""
    rows = batch // accumulate
    return np.arange(accumulate)[:, None] * rows + local_rows(batch_sharding(mesh), accumulate, rows)


def place_batch(loaded: LoadedBatch, batch: int, accumulate: int, mesh: Mesh) -> Batch:
    """This process's rows of a global batch of `batch` as the step takes them: cut into micro-batches,
    spread over the devices."""
    own = own_rows(batch, accumulate, mesh)

    def placed(values: np.ndarray) -> jax.Array:
        cut = values.reshape(*own.shape, *values.shape[1:])
        return place_rows(cut, own[0], batch // accumulate, batch_sharding(mesh))

    index = (loaded.first + own.ravel()).astype(np.uint32)
    return Batch(placed(loaded.tokens), placed(loaded.bad), placed(index))


def blame_leaves(norms: dict[str, np.ndarray], most: int = 3) -> list[str]:
    """The leaves (with their layers) whose gradients are not finite, else those of largest norm."""
    named = {}
    for name, values in norms.items():
        if np.ndim(values) == 0:
            named[name] = float(values)
        else:
            named |= {f"{name}[{layer}]": float(value) for layer, value in enumerate(values)}
    ranked = sorted(named, key=lambda n: (math.isfinite(named[n]), -named[n]))
    return [f"{name} ({named[name]:.3g})" for name in ranked[:most]]
