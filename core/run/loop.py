"""The training loop: evaluate, sample and save before a step, so that first and last are measured alike.

The loop counts and schedules; an `Engine` computes. Metrics are read one step late, so that the device never
waits for the host. Where there are several processes, each runs this loop and decides the same: from the
step, from its metrics, or from what the engines agree on.
"""

import collections
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from core.checkpoint.manifest import MANIFEST, Manifest, load_manifest
from core.checkpoint.steps import step_path
from core.cli import command as command_line
from core.config import ModelConfig
from core.errors import UserError
from core.folders import write_atomically
from core.progress import Activity
from core.run.cadence import Agreement, Due, choose_cadence, find_due, sample_length
from core.run.commands import Steering
from core.run.engine import Engine, InFlight, LoadedBatch
from core.run.guard import Health
from core.run.interrupt import EXIT_FINISHED, EXIT_HALTED, EXIT_KEPT, EXIT_SAVED, Interrupt
from core.run.log import END, HALT, NoLog, RunLog
from core.run.phases import phase_limits
from core.run.reports import Reports
from core.run.settings import TrainingSettings
from core.run.steering import LASTING, Command, Record, Steered
from core.run.steering_queue import Inbox
from core.run.trace import Trace
from core.sampling import Sampling, require_room
from core.tokenizer import Tokenizer

LISTEN = 0.2  # seconds between two looks for a command while a run is paused


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
        self._context = ModelConfig(**self.manifest.config["model"]).context
        self._steps_at_start = self.steps
        self.step = self._first_step = self.manifest.step
        """Updates made so far, skipped ones included."""
        self.cursor = self.manifest.sequences
        """Training sequences read so far: the index of the next batch's first."""
        growth = self.manifest.last_growth
        self._grown_at = growth["step"] if growth else None
        self._saved_step = self.step or None
        self._evaluated: tuple[int, int | None] | None = None  # step and limit of the last evaluation
        self._cadence = choose_cadence(self.settings, self.steps)
        self._paused = False
        self._stopped_by: str | None = None
        self._health = Health(self.checkpoints, self.manifest)
        self._in_flight: collections.deque[InFlight] = collections.deque()
        self._progress = Activity(
            "waiting for the first update", self.end, done=self.step, left="of updates left",
            console=self.console,
        )  # fmt: skip
        out, log = self.checkpoints.parent, self.log
        self._reports = Reports(
            self.settings, self.manifest, out, self.engine.device, log, self.console, self._progress
        )
        self._say = self._reports.say
        self._trace = Trace(self.settings.profile, self.engine, out)
        start = Steered(self.settings.optim, self.settings.guard, self.steps)
        self._steering = Steering(start, self.steering, self.step, self.inbox, log, self._say)
        self._agreement = Agreement(
            self.settings.save_minutes,
            lambda: self.interrupt.requested is not None,
            self._steering.waiting,
        )

    @property
    def _stopping(self) -> bool:
        return self._agreement.stop or (self.engine.alone and self.interrupt.requested is not None)

    def run(self) -> int:
        """Trains until done, interrupted or halted; returns the exit code. The newest state is saved."""
        with self._progress:
            try:
                return self._run()
            finally:
                if self._trace.running:
                    self._end_trace()

    def _run(self) -> int:
        # What an earlier process measured of this state comes again where it is due, and is kept elsewhere.
        evaluates, samples, _ = self._due()
        again = {"eval": evaluates, "task": evaluates and bool(self.settings.eval_tasks), "sample": samples}
        self.log.keep(*(kind for kind, comes in again.items() if not comes))
        try:
            while True:
                self._hear()
                if self._stopping:
                    break
                if self._trace.ends_at(self.step):
                    self._end_trace()
                self._before_step()
                if self.step == self.end or self._stopping:
                    break
                if self._trace.begins_at(self.step):
                    self._read_metrics(leave=0)
                    self._trace.begin()
                self._dispatch()
                self._read_metrics(leave=self.engine.lag)
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
        self._steering.repeat(self.step)
        if self._agreement.steer:
            self._read_metrics(leave=0)
            self._steering.obey(self.step, self.engine.share, self._require_possible, self._act)
        if self._paused and not now:
            self._wait_for_continue()

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
        if command.name in LASTING and self._saved_step == self.step:
            self._amend_checkpoint()
        if command.name == "steps":
            self._change_steps(self._steering.now.steps)
        elif command.name == "save":
            self._save()
        elif command.name == "evaluate":
            self._evaluate(limit=self.settings.eval_windows)
        elif command.name == "sample":
            self._sample([self.tokenizer.begin(command.value)])
        elif command.name == "stop":
            self._agreement.stop, self._stopped_by = True, "the command stop"
        elif command.name in ("pause", "continue"):
            self._paused = command.name == "pause"

    def _change_steps(self, steps: int) -> None:
        """The run, which is under way, gets another length; see `core.run.steering.settle`."""
        self.steps, stop_at = steps, self.settings.stop_at
        self.end = steps if stop_at is None else min(steps, stop_at)
        run = self.manifest.config["run"] | {"steps": steps}
        self.manifest = dataclasses.replace(self.manifest, config=self.manifest.config | {"run": run})
        self._cadence = choose_cadence(self.settings, steps)
        self._progress.total = self.end

    def _amend_checkpoint(self) -> None:
        """Records what has just been steered in the checkpoint of this step, which was saved before it (at a
        pause, or where the run has resumed): whoever grows it goes on as the run would."""
        self._wait()
        path = step_path(self.checkpoints, self.step) / MANIFEST
        if self.inbox and path.is_file():
            manifest = load_manifest(path.parent)
            run = manifest.config["run"] | {"steps": self._steering.now.steps}
            manifest = dataclasses.replace(
                manifest, steering=self._steered_so_far(), config=manifest.config | {"run": run}
            )
            write_atomically(path, manifest.to_json())

    def _steered_so_far(self) -> list[Record] | None:
        return [record for record in self._steering.records if record["step"] <= self.step] or None

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

    def _end_trace(self) -> None:
        if not isinstance(sys.exception(), Exception):  # one that ends the run may be of the device
            self._read_metrics(leave=0)
        self._trace.end(self.step, self.log, self._say)

    def _stop_early(self) -> int:
        started = self.step > self._first_step
        if started:
            self._save()
        self._wait()
        length = f" with --steps {self.steps}" if self.steps != self._steps_at_start else ""  # as steered
        length += " instead of --epochs" if length and self.settings.epochs is not None else ""
        again = f"run the same command{length} to resume"
        by = self._stopped_by or self.interrupt.requested or "another process"
        self.log.write(self.step, "event", what=f"interrupted by {by}")
        if started:
            self._say(f"saved step {self.step}; {again}")
            return EXIT_SAVED
        kept = "nothing to keep yet" if self._saved_step is None else f"step {self._saved_step} is kept"
        self._say(f"stopped before the first step: {kept}; {again}")
        return EXIT_KEPT

    def _due(self) -> Due:
        """What is due before the next update."""
        step = self.step
        evaluate, sample, save = find_due(self._cadence, step, step == self.end, self._agreement.late)
        return Due(
            evaluate=evaluate or step == self._grown_at,
            sample=sample and bool(self.prompts),
            save=save or (step > 0 and step in self.settings.keep_steps),
        )

    def _before_step(self) -> None:
        last, grown = self.step == self.end, self.step == self._grown_at
        evaluate, sample, save = self._due()
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
        now = self._steering.now
        lr, left_out = now.lr(self.step), now.leaves_out(self.step)
        guard = phase_limits(now.guard, self.manifest.data, self.cursor, self.settings.batch)
        try:
            batch = next(self.batches)
            if batch.first != self.cursor:
                raise RuntimeError(f"the batch starts at {batch.first}, the cursor is at {self.cursor}")
            pending = None if left_out else self.engine.dispatch(batch, self.step, lr, guard)
        except UserError:  # a damaged record, or a compilation that is forbidden: what was learned is kept
            # Several do not all know of it, and saving is the work of all.
            if self.engine.alone and self.step > self._first_step:
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
            self._reports.update(done, metrics, self.end)
            for news in self.engine.news():
                self._reports.compiled(done.step, news)
            if self._reports.mixture_changed(done):
                self._health.forget()
            self._health.see(metrics.loss, metrics.streak)
            if metrics.streak >= done.guard.halt_after:
                self._in_flight.clear()  # they changed nothing: the engine stops applying by itself
                raise Halted(
                    f"{metrics.streak} updates in a row were not applied, the last at step {done.step} "
                    f"with loss {metrics.loss:.4g} and gradient norm {metrics.grad_norm:.4g}"
                )

    def _evaluate(self, limit: int | None) -> None:
        if self._evaluated == (self.step, limit):  # on command, and due as well
            return
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
        self._evaluated = self.step, limit

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
            steering=self._steered_so_far(),
        )
        with Activity(f"saving step {self.step}"):
            self.engine.save(manifest)
        self._saved_step = self.step
        self._agreement.saved()

    def _wait(self) -> None:
        with Activity("waiting until the checkpoint is on the disk"):
            self.engine.wait()
