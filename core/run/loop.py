"""The training loop: evaluate, sample and save before a step, so that first and last are measured alike.

The loop counts and schedules; an `Engine` computes. Metrics are read one step late, so that the device never
waits for the host. Where there are several processes, each runs this loop and decides the same: from the
step, from its metrics, or from what the engines agree on.
"""

import collections
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from core.checkpoint.manifest import TORCH, Manifest
from core.cli import command as command_line
from core.config import ModelConfig
from core.data.mixture import phase_number, phases_of
from core.errors import UserError
from core.progress import Activity
from core.run.cadence import Agreement, choose_cadence, find_due, sample_length
from core.run.engine import Engine, LoadedBatch, Metrics
from core.run.guard import GuardConfig, Health
from core.run.interrupt import EXIT_FINISHED, EXIT_HALTED, EXIT_KEPT, EXIT_SAVED, Interrupt
from core.run.log import END, HALT, NoLog, RunLog
from core.run.metrics import model_flops_utilization
from core.run.phases import phase_limits
from core.run.profiling import FOLDER as PROFILE
from core.run.profiling import describe, parse_updates
from core.run.settings import PretrainingSource, TrainingSettings
from core.run.steering import LASTING, Command, Record, Steered, apply, parse, settle, steered
from core.run.steering_queue import REFUSED, STEERED, Inbox, Typed
from core.sampling import Sampling, require_room
from core.tokenizer import Tokenizer

METRICS_LAG = 1  # steps that may be under way while the metrics of the one before are read
LISTEN = 0.2  # seconds between two looks for a command while a run is paused


class InFlight(NamedTuple):
    """A dispatched step whose metrics have not been read."""

    step: int
    batch: LoadedBatch
    lr: float
    guard: GuardConfig
    pending: Any


class Halted(Exception):
    """The guard has refused `halt_after` updates in a row."""


@dataclasses.dataclass
class Loop:
    """One run, from the step of `manifest` to `end`."""

    settings: TrainingSettings
    engine: Engine
    """It has the state that `manifest` describes."""
    batches: Iterator[LoadedBatch]
    """From the manifest's cursor on."""
    manifest: Manifest
    """What every checkpoint's manifest says, but for the counters."""
    checkpoints: Path
    """The folder that the engine saves into."""
    steps: int
    """Updates that the schedule is for."""
    end: int
    """Updates after which to stop: `steps`, or fewer."""
    prompts: list[list[int]]
    """Ids to sample from."""
    tokenizer: Tokenizer
    log: RunLog | NoLog
    console: Console
    interrupt: Interrupt
    steering: list[Record] = dataclasses.field(default_factory=list)
    """What was steered before, and what comes again at later steps."""
    inbox: Inbox | None = None
    """Where commands come in; None in a process that is not the first."""

    def __post_init__(self) -> None:
        model = ModelConfig(**self.manifest.config["model"])
        self._context, self._flops_per_token = model.context, model.flops_per_token()
        self.step = self._first_step = self.manifest.step
        """Updates made so far, skipped ones included."""
        self.cursor = self.manifest.sequences
        """Training sequences read so far: the index of the next batch's first."""
        growth = self.manifest.last_growth
        self._grown_at = growth["step"] if growth else None
        self._saved_step = self.step or None
        self._cadence = choose_cadence(self.settings, self.steps)
        self._agreement = Agreement(
            self.settings.save_minutes,
            lambda: self.interrupt.requested is not None,
            lambda: self.inbox is not None and self.inbox.waiting(),
        )
        self._start = Steered(self.settings.optim, self.settings.guard, self.steps)
        self._now = steered(self._start, self.steering, self.step)
        """What the next update's settings are."""
        self._repeated = collections.deque(r for r in self.steering if r["step"] >= self.step)
        self._paused = False
        self._stopped_by: str | None = None
        self._profiled = parse_updates(self.settings.profile) if self.settings.profile else None
        self._profiling = False
        self._n_read = 0  # updates whose metrics were read
        self._health = Health(self.checkpoints, self.manifest)
        self._phase = phase_number(self.manifest.data, self.cursor)
        self._in_flight: collections.deque[InFlight] = collections.deque()
        self._durations: collections.deque[float] = collections.deque(maxlen=20)
        self._worked = 0.0  # seconds of work, without evaluations and the like, at the newest metrics
        self._progress = Activity(
            "waiting for the first update", self.end, done=self.step, left="of updates left",
            console=self.console,
        )  # fmt: skip

    @property
    def _stopping(self) -> bool:
        return self._agreement.stop or (self.engine.alone and self.interrupt.requested is not None)

    def run(self) -> int:
        """Trains until done, interrupted or halted; returns the exit code. The newest state is saved."""
        with self._progress:
            try:
                return self._run()
            finally:
                if self._profiling:
                    self._end_profile()

    def _run(self) -> int:
        try:
            while True:
                self._hear()
                if self._stopping:
                    break
                if self._profiling and self.step >= self._profiled[1]:
                    self._end_profile()
                self._before_step()
                if self.step == self.end or self._stopping:
                    break
                if self._profiled and self.step == self._profiled[0]:
                    self._begin_profile()
                self._dispatch()
                self._read_metrics(leave=METRICS_LAG)
            self._read_metrics(leave=0)
        except Halted as halted:
            self._save()
            self._wait()
            self.log.write(self.step, "event", what=HALT, why=str(halted))
            self._say(f"halted: {halted}; {self._health.after_halt(self.step)}")
            return EXIT_HALTED
        if self.step == self.end and not self._stopping:
            self._save()
            self._wait()
            whole = self.end == self.steps
            self.log.write(self.step, "event", what=END if whole else f"stopped, as asked, of {self.steps}")
            return EXIT_FINISHED
        return self._stop_early()

    def _hear(self, now: bool = False) -> None:
        """Agrees with all processes before a step; what was steered then holds for it.

        now: without waiting for the updates that agree by the way.
        """
        self._agreement.hear(*self.engine.agree(self.step, self._agreement.flags(), now))
        while self._repeated and self._repeated[0]["step"] <= self.step:
            record = self._repeated.popleft()
            self._now = steered(self._start, self.steering, self.step)
            self.log.write(self.step, "event", what=STEERED, command=record["command"])
        if self._agreement.steer:
            self._read_metrics(leave=0)
            taken = self.engine.share(json.dumps(self.inbox.take() if self.inbox else []))
            for typed in json.loads(taken):
                self._obey(Typed(*typed))
        if self._paused and not now:
            self._wait_for_continue()

    def _obey(self, typed: Typed) -> None:
        def refuse(error: UserError) -> None:
            self.log.write(self.step, "event", what=REFUSED, id=typed.id, why=str(error))
            self._say(f"step {self.step}: not steered: {error}")

        try:
            commands = parse(typed.words)
        except UserError as error:
            refuse(error)
            return
        for command in commands:
            try:
                settled = settle(command, self._now, self.step)
                self._require_possible(command)
            except UserError as error:
                refuse(error)
                continue
            self.log.write(self.step, "event", what=STEERED, id=typed.id, command=str(settled))
            self._say(f"step {self.step}: steered: {settled}")
            self._act(settled)

    def _require_possible(self, command: Command) -> None:
        if command.name == "continue" and not self._paused:
            raise UserError("the run is not paused")
        if command.name == "pause" and self._paused:
            raise UserError("the run is paused already")
        if command.name == "save" and self.step == 0:
            raise UserError("no update has been made: there is nothing to save yet")
        if command.name == "sample":
            require_room([self.tokenizer.begin(command.value)], self._context)

    def _act(self, command: Command) -> None:
        if command.name in LASTING:
            self.steering = [*self.steering, Record(step=self.step, command=str(command))]
            self._now = apply(self._now, command)
            if command.name == "steps":
                self._change_steps(self._now.steps)
            if self.inbox:
                self.inbox.keep(self.steering, self.steps)
        elif command.name == "save":
            self._save()
        elif command.name == "evaluate":
            self._evaluate(limit=self.settings.eval_windows)
        elif command.name == "sample":
            self._sample([self.tokenizer.begin(command.value)])
        elif command.name == "stop":
            self._agreement.stop, self._stopped_by = True, "the command stop"
        else:
            self._paused = command.name == "pause"

    def _change_steps(self, steps: int) -> None:
        """The run, which is under way, gets another length; see `core.run.steering.settle`."""
        self.steps, stop_at = steps, self.settings.stop_at
        self.end = steps if stop_at is None else min(steps, stop_at)
        self._start = dataclasses.replace(self._start, steps=steps)
        run = self.manifest.config["run"] | {"steps": steps}
        self.manifest = dataclasses.replace(self.manifest, config=self.manifest.config | {"run": run})
        self._cadence = choose_cadence(self.settings, steps)
        self._progress.total = self.end

    def _wait_for_continue(self) -> None:
        """The folder stays locked, and the state is saved: a run that is killed now loses nothing."""
        if self.step > self._first_step:
            self._save()
        self._wait()
        way = command_line("train_tpu.steer", self.checkpoints.parent, "continue")
        self._say(f"paused at step {self.step}; `{way}` resumes it, Ctrl-C stops it")
        with Activity(f"paused at step {self.step}"):
            while self._paused and not self._stopping:
                time.sleep(LISTEN)
                self._hear(now=True)

    def _begin_profile(self) -> None:
        self._read_metrics(leave=0)
        self.engine.start_profile(self.checkpoints.parent / PROFILE)
        self._profiling = True

    def _end_profile(self) -> None:
        if not isinstance(sys.exception(), Exception):  # one that ends the run may be of the device
            self._read_metrics(leave=0)
        self._profiling = False
        folder = self.checkpoints.parent / PROFILE
        with Activity(f"writing the trace into {folder}"):
            operations = self.engine.stop_profile()
        made = self.step - self._profiled[0]
        self.log.write(self.step, "event", what="profiled", updates=[self._profiled[0], self.step])
        self._say(f"traced {made} updates into {folder}; {describe(operations, max(1, made))}")

    def _stop_early(self) -> int:
        started = self.step > self._first_step
        if started:
            self._save()
        self._wait()
        by = self._stopped_by or self.interrupt.requested or "another process"
        self.log.write(self.step, "event", what=f"interrupted by {by}")
        if started:
            self._say(f"saved step {self.step}; run the same command to resume")
            return EXIT_SAVED
        kept = "nothing to keep yet" if self._saved_step is None else f"step {self._saved_step} is kept"
        self._say(f"stopped before the first step: {kept}; run the same command to resume")
        return EXIT_KEPT

    def _before_step(self) -> None:
        step, last, grown = self.step, self.step == self.end, self.step == self._grown_at
        evaluate, sample, save = find_due(self._cadence, step, last, self._agreement.late)
        evaluate |= grown
        sample &= bool(self.prompts)
        save |= step > 0 and step in self.settings.keep_steps
        if not (evaluate or sample or save):
            return
        self._read_metrics(leave=0)
        if evaluate:
            self._evaluate(limit=None if last or grown else self.settings.eval_windows)
            if not self._stopping:
                self._evaluate_tasks(limit=None if last else self.settings.eval_questions)
        if sample and not self._stopping:
            self._sample(self.prompts)
        if save:
            self._save()

    def _dispatch(self) -> None:
        now = self._now
        lr, left_out = now.lr(self.step), now.leaves_out(self.step)
        guard = phase_limits(now.guard, self.manifest.data, self.cursor, self.settings.batch)
        try:
            batch = next(self.batches)
            if batch.first != self.cursor:
                raise RuntimeError(f"the batch starts at {batch.first}, the cursor is at {self.cursor}")
            pending = None if left_out else self.engine.dispatch(batch, self.step, lr, guard)
        except UserError:  # a damaged record, or a compilation that is forbidden: what was learned is kept
            if self.engine.alone:  # others do not know of it, and saving is the work of all
                self._read_metrics(leave=0)
                self._save()
            raise
        if left_out:
            self._progress.advance(text="left out, as asked", line=False)
        else:
            self._in_flight.append(InFlight(self.step, batch, lr, guard, pending))
        self.step += 1
        self.cursor += self.settings.batch

    def _read_metrics(self, leave: int) -> None:
        while len(self._in_flight) > leave:
            done = self._in_flight.popleft()
            metrics = self.engine.read(done.pending)
            now = self._progress.work
            if self._n_read == 1:
                self._durations.clear()  # of the first update, which may have waited for compilation
            self._durations.append(now - self._worked)
            self._worked = now
            if self._n_read == 0:
                self._report_start()
            self._n_read += 1
            self._report(done, metrics)
            for news in self.engine.news():
                self.log.write(done.step, "event", what="compiled", why=news.text)
                if news.unexpected:
                    self._say(f"step {done.step}: {news.text}")
            self._notice_phase(done)
            self._health.see(metrics.loss, metrics.streak)
            if metrics.streak >= done.guard.halt_after:
                self._in_flight.clear()  # they changed nothing: the engine stops applying by itself
                raise Halted(
                    f"{metrics.streak} updates in a row were not applied, the last at step {done.step} "
                    f"with loss {metrics.loss:.4g} and gradient norm {metrics.grad_norm:.4g}"
                )

    def _notice_phase(self, done: InFlight) -> None:
        """Says so where another mixture begins: losses before and after do not compare."""
        data = self.manifest.data
        number = phase_number(data, done.batch.first + self.settings.batch)
        if number > self._phase:
            self._phase = number
            self.log.write(done.step, "event", what="mixture", shares=str(phases_of(data)[number - 1]))
            self._say(f"step {done.step}: mixture: {phases_of(data)[number - 1]}")
            self._health.forget()

    def _report_start(self) -> None:
        seconds, aside = round(process_age(), 1), round(self._progress.aside, 1)
        self.log.write(self._first_step, "event", what="first update", seconds=seconds, aside=aside)
        of_them = f", {aside} s of them evaluating and sampling" if aside else ""
        self._say(f"the first update was made {seconds} s after the start{of_them}")

    def _report(self, done: InFlight, metrics: Metrics) -> None:
        seconds = sum(self._durations) / len(self._durations)
        rate = self.settings.batch * self._context / seconds
        self.log.write(
            done.step,
            "train",
            tokens=done.batch.first * self._context,
            loss=metrics.loss,
            nll=metrics.nll,
            grad_norm=metrics.grad_norm,
            lr=done.lr,
            tokens_per_second=round(rate),
        )
        if metrics.watched:
            self.log.watch(done.step, metrics.watched)
        if not metrics.applied:
            self._report_skip(done, metrics)
        bad = set(done.batch.records[done.batch.bad].tolist())
        asked = bad & set(getattr(self.settings, "leave_out", ()))
        for kind, records in (("damaged records", bad - asked), ("records named by --leave-out", asked)):
            if records:
                self.log.write(done.step, "event", what=f"{kind} left out", records=sorted(records))
                self._say(f"step {done.step}: left out {kind} {sorted(records)}")
        mfu = model_flops_utilization(rate, self._flops_per_token, *self.engine.device)
        used = "" if mfu is None else f", MFU {mfu:.1%}"
        self._progress.name = f"step {done.step}/{self.end}"
        self._progress.advance(
            text=f"loss {metrics.nll:.4f}, lr {done.lr:.2e}, {rate:,.0f} tokens/s{used}",
            line=done.step % self.settings.log_every == 0 or done.step == self.end - 1,
        )

    def _report_skip(self, done: InFlight, metrics: Metrics) -> None:
        first, blame = done.batch.first, blame_leaves(metrics.leaf_norms)
        self.log.write(
            done.step,
            "skip",
            loss=metrics.loss,
            grad_norm=metrics.grad_norm,
            streak=metrics.streak,
            skipped=metrics.skipped,
            sequences=[first, first + self.settings.batch],
            records=done.batch.records.tolist(),
            blame=blame,
        )
        self._say(
            f"step {done.step}: update skipped (loss {metrics.loss:.4g}, gradient norm "
            f"{metrics.grad_norm:.4g}), largest in {', '.join(blame)}; sequences {first} to "
            f"{first + self.settings.batch - 1}, see metrics.jsonl; {metrics.skipped} skipped so far"
            f"{self._how_to_replay(done.step) if metrics.streak == 1 else ''}"
        )

    def _how_to_replay(self, step: int) -> str:
        if not isinstance(self.settings, PretrainingSource):
            return ""
        up_to = " (JAX makes it again, equal up to rounding)" if self.manifest.engine == TORCH else ""
        typed = command_line("train_tpu.replay", self.checkpoints.parent, "--step", step)
        return f"; to look into it{up_to}: {typed}"

    def _evaluate(self, limit: int | None) -> None:
        for split in self.engine.heldout:
            score = self.engine.score(split, limit, lambda: self._stopping)
            if score is None:
                return
            tokens = self.cursor * self._context
            self.log.write(
                self.step, "eval", split=split, tokens=tokens, nll=score.nll, perplexity=score.perplexity,
                bits_per_byte=score.bits_per_byte, scored_tokens=score.tokens,
            )  # fmt: skip
            self._say(
                f"step {self.step}: {split}: {score.bits_per_byte:.4f} bits per byte, "
                f"{score.nll:.4f} nats per token, perplexity {score.perplexity:.2f}"
            )

    def _evaluate_tasks(self, limit: int | None) -> None:
        stop = lambda: self._stopping  # noqa: E731
        for task, questions, metrics in self.engine.evaluate_tasks(limit, stop, self._say):
            values = {f"{task}/{name}": value for name, value, _ in metrics}
            self.log.write(self.step, "task", task=task, questions=questions, **values)
            texts = [text for _, _, text in metrics]
            self._say(f"step {self.step}: {task}: {', '.join(texts)} ({questions:,} questions)")

    def _sample(self, prompts: list[list[int]]) -> None:
        """With fixed keys, and but for a command from fixed prompts: what changes is the model."""
        sampling = Sampling(seed=self.settings.seed)
        with Activity("sampling"):
            made = self.engine.sample(prompts, sampling, sample_length(self.step), self.tokenizer.eos)
        if made is None:
            return
        texts = [self.tokenizer.decode([*p, *new]) for p, new in zip(prompts, made, strict=True)]
        self.log.sample(self.step, texts)
        self._say("\n".join(f"  | {' '.join(text.split())}" for text in texts[:2]))

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
            steering=[record for record in self.steering if record["step"] <= self.step] or None,
        )
        with Activity(f"saving step {self.step}"):
            self.engine.save(manifest)
        self._saved_step = self.step
        self._agreement.saved()

    def _wait(self) -> None:
        with Activity("waiting until the checkpoint is on the disk"):
            self.engine.wait()

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def blame_leaves(norms: Mapping[str, Any], most: int = 3) -> list[str]:
    """The leaves (with their layers) whose gradients are not finite, else those of largest norm."""
    named = {}
    for name, values in norms.items():
        if np.ndim(values) == 0:
            named[name] = float(values)
        else:
            named |= {f"{name}[{layer}]": float(value) for layer, value in enumerate(values)}
    ranked = sorted(named, key=lambda n: (math.isfinite(named[n]), -named[n]))
    return [f"{name} ({named[name]:.3g})" for name in ranked[:most]]


def process_age() -> float:
    """Seconds since this process started, its imports included (Linux)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
