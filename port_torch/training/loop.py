"""The training loop: evaluate, sample and save before a step, so that first and last are measured alike.

Figures are read one step late, so that the device never waits for the host. Where there are several ranks,
each runs this loop and decides the same: from the step, or from a sum over all ranks. Log, samples and
checkpoints are the first one's.
"""

import collections
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from core.checkpoint.manifest import Manifest
from core.errors import UserError
from core.run.cadence import Agreement, Cadence, find_due, sample_length
from core.run.guard import Health
from core.run.interrupt import EXIT_FINISHED, EXIT_HALTED, EXIT_KEPT, EXIT_SAVED, Interrupt
from core.run.log import NoLog, RunLog
from core.run.metrics import model_flops_utilization
from core.run.progress import Progress
from core.run.schedule import learning_rate
from core.sampling import Sampling
from core.tokenizer import Tokenizer
from port_torch.sampling import stream
from port_torch.training import checkpoint
from port_torch.training.batches import Batch, HeldOut
from port_torch.training.evaluate import score
from port_torch.training.settings import TrainerConfig
from port_torch.training.step import FIGURES, Stepper
from train_tpu.loop import END, METRICS_LAG


class Figures:
    """The `FIGURES` of one update, on their way to the host."""

    def __init__(self, on_device: Tensor):
        self._event = None
        if on_device.is_cuda:
            # A plain copy would wait for whatever was queued behind it as well.
            self._host = torch.empty(on_device.shape, pin_memory=True)
            self._host.copy_(on_device, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = on_device

    def read(self) -> dict[str, float]:
        """Waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(FIGURES, self._host.tolist(), strict=True))


class InFlight(NamedTuple):
    """An update whose figures have not been read."""

    step: int
    batch: Batch
    lr: float
    figures: Figures


class Halted(Exception):
    """The guard has refused `halt_after` updates in a row."""


@dataclasses.dataclass
class Loop:
    """One run from `step` to `end`."""

    config: TrainerConfig
    stepper: Stepper
    parts: int
    """In which a rank computes its rows."""
    step: int
    """Updates made so far, skipped ones included."""
    steps: int
    """Updates that the schedule is for."""
    end: int
    """Updates after which to stop: `steps`, or fewer."""
    batches: Iterator[Batch]
    heldout: list[HeldOut]
    rows: int
    """Rows that a rank computes at once."""
    context: int
    tokenizer: Tokenizer
    prompts: list[list[int]]
    """Ids that the samples go on from."""
    folder: Path
    manifest: Manifest
    """What every checkpoint's manifest says, but for the counters."""
    log: RunLog | NoLog
    progress: Progress
    interrupt: Interrupt
    cadence: Cadence
    flops_per_token: int

    def __post_init__(self) -> None:
        self._first_step = self.step
        self._agreement = Agreement(self.config.save_minutes, lambda: self.interrupt.requested is not None)
        self._health = Health(self.folder / "checkpoints", self.manifest)
        self._streak = 0
        self._in_flight: collections.deque[InFlight] = collections.deque()
        self._durations: collections.deque[float] = collections.deque(maxlen=20)
        self._clock = time.monotonic()

    def run(self) -> int:
        """Trains until done, interrupted or halted; returns the exit code. The newest state is saved."""
        try:
            while not self._stopping():
                self._before_step()
                if self.step == self.end or self._stopping():
                    break
                self._dispatch()
                self._read_figures(leave=METRICS_LAG)
            self._read_figures(leave=0)
        except Halted as halted:
            self._save()
            self.log.write(self.step, "event", what="halt", why=str(halted))
            self.progress.say(f"halted: {halted}; {self._health.after_halt(self.step)}")
            return EXIT_HALTED
        if self.step == self.end and not self._stopping():
            self._save()
            whole = self.end == self.steps
            self.log.write(self.step, "event", what=END if whole else f"stopped, as asked, of {self.steps}")
            return EXIT_FINISHED
        by = self.interrupt.requested or "another process"
        self.log.write(self.step, "event", what=f"interrupted by {by}")
        if self.step > self._first_step:
            self._save()
            self.progress.say(f"saved step {self.step}: the same command goes on from there")
            return EXIT_SAVED
        self.progress.say("no step was made since the start: the same command goes on from there")
        return EXIT_KEPT

    def _stopping(self) -> bool:
        """Whether to stop here: with several ranks, once an update told all of them that one was asked to."""
        alone = self.stepper.ranks.size == 1
        return self._agreement.stop or (alone and self.interrupt.requested is not None)

    def _before_step(self) -> None:
        step, last = self.step, self.step == self.end
        evaluate, sample, save = find_due(self.cadence, step, last, self._agreement.late)
        sample &= bool(self.prompts)
        if not (evaluate or sample or save):
            return
        self._read_figures(leave=0)
        if evaluate:
            self._evaluate(limit=None if last else self.config.eval_windows)
        if sample and self.stepper.ranks.first and not self._stopping():
            self._sample()
        if save:
            self._save()
        self._clock = time.monotonic()

    def _dispatch(self) -> None:
        try:
            batch = next(self.batches)
        except UserError:  # a damaged record: what was learned until here is kept
            self._read_figures(leave=0)
            self._save()
            raise
        first = self.step * self.config.batch
        if batch.first != first:
            raise RuntimeError(f"the batch starts at {batch.first}, the cursor is at {first}")
        rate = learning_rate(self.config.optim, self.step, self.steps)
        figures = self.stepper.update(batch.rows, self.parts, self.step, rate, self._agreement.wishes())
        self._in_flight.append(InFlight(self.step, batch, rate, Figures(figures)))
        self.step += 1

    def _read_figures(self, leave: int) -> None:
        while len(self._in_flight) > leave:
            done = self._in_flight.popleft()
            figures = done.figures.read()
            now = time.monotonic()
            self._durations.append(now - self._clock)
            self._clock = now
            self._agreement.hear(figures["interrupted"] > 0, figures["late"] > 0)
            self._streak = self._streak + 1 if figures["skipped"] else 0
            self._report(done, figures)
            self._health.see(figures["loss"], self._streak)
            if self._streak == self.config.guard.halt_after:
                # What is in flight behind it changes the state unless it is refused as well: it counts.
                raise Halted(
                    f"{self._streak} updates in a row were not applied, the last at step {done.step} with "
                    f"loss {figures['loss']:.4g} and gradient norm {figures['grad_norm']:.4g}"
                )

    def _report(self, done: InFlight, figures: dict[str, float]) -> None:
        seconds = sum(self._durations) / len(self._durations)
        rate, ranks = self.config.batch * self.context / seconds, self.stepper.ranks
        shown = {name: figures[name] for name in ("loss", "nll", "grad_norm")}
        tokens = done.batch.first * self.context
        self.log.write(done.step, "train", tokens=tokens, **shown, lr=done.lr, tokens_per_second=round(rate))
        if figures["skipped"]:
            self.log.write(
                done.step, "skip", **shown, streak=self._streak, records=done.batch.records.tolist()
            )
            self.progress.say(
                f"step {done.step}: update not applied: loss {figures['loss']:.4g}, gradient norm "
                f"{figures['grad_norm']:.4g} (records in metrics.jsonl)"
            )
        bad = done.batch.records[done.batch.bad]
        if len(bad):
            self.log.write(done.step, "event", what="damaged records left out", records=bad.tolist())
            self.progress.say(f"step {done.step}: left out damaged training records {bad.tolist()}")
        mfu = None
        if ranks.device.type == "cuda":
            kind = torch.cuda.get_device_name(ranks.device)
            mfu = model_flops_utilization(rate, self.flops_per_token, kind, ranks.size)
        self.progress.step(done.step, figures["nll"], done.lr, rate, mfu, seconds)

    def _evaluate(self, limit: int | None) -> None:
        for heldout in self.heldout:
            found = score(self.stepper, heldout, self.rows, limit, self._stopping)
            if found is None:
                return
            tokens = self.step * self.config.batch * self.context
            self.log.write(
                self.step, "eval", split=heldout.name, tokens=tokens, nll=found.nll,
                perplexity=found.perplexity, bits_per_byte=found.bits_per_byte, scored_tokens=found.tokens,
            )  # fmt: skip
            self.progress.say(
                f"step {self.step}: {heldout.name}: {found.bits_per_byte:.4f} bits per byte, "
                f"{found.nll:.4f} nats per token, perplexity {found.perplexity:.2f}"
            )

    def _sample(self) -> None:
        """Goes on from fixed prompts with fixed random numbers: what changes is the model."""
        decoder = self.stepper.decoder.eval()
        made: list[list[int]] = [[] for _ in self.prompts]
        sampling = Sampling(seed=self.config.seed)
        for new in stream(decoder, self.prompts, sampling, sample_length(self.step), self.tokenizer.eos):
            for ids, token in zip(made, new, strict=True):
                ids += [] if token is None else [token]
        texts = [self.tokenizer.decode([*p, *ids]) for p, ids in zip(self.prompts, made, strict=True)]
        self.log.sample(self.step, texts)
        self.progress.say("\n".join(f"  | {' '.join(text.split())}" for text in texts[:2]))

    def _save(self) -> None:
        self._agreement.saved()
        if not self.stepper.ranks.first:
            return
        sequences = self.step * self.config.batch
        manifest = dataclasses.replace(
            self.manifest,
            step=self.step,
            sequences=sequences,
            tokens=sequences * self.context,
            data={**self.manifest.data, "cursor": sequences},
            health=self._health.record(),
        )
        checkpoint.save(self.folder / "checkpoints", self.stepper, manifest, self.config.keep_last)
