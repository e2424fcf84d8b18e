"""What the log and the console are told of updates: their losses, how fast they are, and what went wrong."""

import collections
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from core.checkpoint.manifest import TORCH, Manifest
from core.cli import command as command_line
from core.config import ModelConfig
from core.data.mixture import phase_number, phases_of
from core.progress import Activity
from core.run.engine import Device, InFlight, Metrics, News
from core.run.log import NoLog, RunLog
from core.run.metrics import model_flops_utilization
from core.run.settings import PretrainingSource, TrainingSettings

BLAMED = 3  # leaves that are named of a skipped update


class Reports:
    """Tells the log and the console of the updates of one run."""

    def __init__(
        self, settings: TrainingSettings, manifest: Manifest, out: Path, device: Device,
        log: RunLog | NoLog, console: Console, progress: Activity,
    ):  # fmt: skip
        """
        Args:
            manifest: of the state that the run starts from.
            out: the run's folder.
            progress: counts the updates.
        """
        model = ModelConfig(**manifest.config["model"])
        self._context, self._flops_per_token = model.context, model.flops_per_token()
        self._settings, self._manifest, self._out, self._device = settings, manifest, out, device
        self._log, self._console, self._progress = log, console, progress
        self._phase = phase_number(manifest.data, manifest.sequences)
        self._n = 0  # updates reported
        self._durations: collections.deque[float] = collections.deque(maxlen=20)
        self._worked = 0.0  # seconds of work, without evaluations and the like, at the newest update

    def say(self, text: str) -> None:
        """Prints it as it is."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def update(self, done: InFlight, metrics: Metrics, end: int) -> None:
        """An update whose metrics have just been read, of a run that ends at update `end`."""
        now = self._progress.work
        if self._n == 1:
            self._durations.clear()  # of the first update, which may have waited for compilation
        self._durations.append(now - self._worked)
        self._worked = now
        if self._n == 0:
            self._start()
        self._n += 1
        seconds = sum(self._durations) / len(self._durations)
        rate = self._settings.batch * self._context / seconds
        self._log.write(
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
            self._log.watch(done.step, metrics.watched)
        if not metrics.applied:
            self._skip(done, metrics)
        self._records_left_out(done)
        mfu = model_flops_utilization(rate, self._flops_per_token, *self._device)
        used = "" if mfu is None else f", MFU {mfu:.1%}"
        self._progress.name = f"step {done.step}/{end}"
        self._progress.advance(
            text=f"loss {metrics.nll:.4f}, lr {done.lr:.2e}, {rate:,.0f} tokens/s{used}",
            line=done.step % self._settings.log_every == 0 or done.step == end - 1,
        )

    def compiled(self, step: int, news: News) -> None:
        """A compilation that came with update `step`."""
        self._log.write(step, "event", what="compiled", why=news.text)
        if news.unexpected:
            self.say(f"step {step}: {news.text}")

    def mixture_changed(self, done: InFlight) -> bool:
        """Whether another mixture begins behind this update; it is said, as losses do not compare."""
        data = self._manifest.data
        number = phase_number(data, done.batch.first + self._settings.batch)
        if number <= self._phase:
            return False
        self._phase = number
        self._log.write(done.step, "event", what="mixture", shares=str(phases_of(data)[number - 1]))
        self.say(f"step {done.step}: mixture: {phases_of(data)[number - 1]}")
        return True

    def _start(self) -> None:
        seconds, aside = round(process_age(), 1), round(self._progress.aside, 1)
        self._log.write(self._manifest.step, "event", what="first update", seconds=seconds, aside=aside)
        of_them = f", {aside} s of them evaluating and sampling" if aside else ""
        self.say(f"the first update was made {seconds} s after the start{of_them}")

    def _skip(self, done: InFlight, metrics: Metrics) -> None:
        first, blame = done.batch.first, blame_leaves(metrics.leaf_norms)
        self._log.write(
            done.step,
            "skip",
            loss=metrics.loss,
            grad_norm=metrics.grad_norm,
            streak=metrics.streak,
            skipped=metrics.skipped,
            sequences=[first, first + self._settings.batch],
            records=done.batch.records.tolist(),
            blame=blame,
        )
        self.say(
            f"step {done.step}: update skipped (loss {metrics.loss:.4g}, gradient norm "
            f"{metrics.grad_norm:.4g}), largest in {', '.join(blame)}; sequences {first} to "
            f"{first + self._settings.batch - 1}, see metrics.jsonl; {metrics.skipped} skipped so far"
            f"{self._how_to_replay(done.step) if metrics.streak == 1 else ''}"
        )

    def _how_to_replay(self, step: int) -> str:
        if not isinstance(self._settings, PretrainingSource):
            return ""
        up_to = " (JAX makes it again, equal up to rounding)" if self._manifest.engine == TORCH else ""
        typed = command_line("train_tpu.replay", self._out, "--step", step)
        return f"; to look into it{up_to}: {typed}"

    def _records_left_out(self, done: InFlight) -> None:
        bad = set(done.batch.records[done.batch.bad].tolist())
        asked = bad & set(getattr(self._settings, "leave_out", ()))
        for kind, records in (("damaged records", bad - asked), ("records named by --leave-out", asked)):
            if not records:
                continue
            said = f"step {done.step}: left out {kind} {sorted(records)}"
            if isinstance(self._log, NoLog):  # rows that the first process, which has the log, did not read
                print(said, file=sys.stderr, flush=True)
            else:
                self._log.write(done.step, "event", what=f"{kind} left out", records=sorted(records))
                self.say(said)


def blame_leaves(norms: Mapping[str, Any]) -> list[str]:
    """The `BLAMED` leaves (with their layers) whose gradients are not finite, else those of largest norm."""
    named = {}
    for name, values in norms.items():
        if np.ndim(values) == 0:
            named[name] = float(values)
        else:
            named |= {f"{name}[{layer}]": float(value) for layer, value in enumerate(values)}
    ranked = sorted(named, key=lambda n: (math.isfinite(named[n]), -named[n]))
    return [f"{name} ({named[name]:.3g})" for name in ranked[:BLAMED]]


def process_age() -> float:
    """Seconds since this process started, its imports included (Linux)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
