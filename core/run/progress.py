"""What a run prints: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar


class Progress:
    """Progress of a run: step, loss, rate, MFU and time left."""

    def __init__(self, console: Console, steps: int, start: int, log_every: int):
        """log_every: steps between lines where the output is not a terminal."""
        self.console = console
        self.steps = steps
        self.log_every = log_every
        self._started = time.monotonic()
        self._start = start
        self._bar = Bar(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=30),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=steps, completed=start)
        if console.is_terminal:
            self._bar.start()

    def step(self, step: int, nll: float, lr: float, rate: float, mfu: float | None, seconds: float) -> None:
        """Reports update `step`: loss before it, learning rate, tokens per second, MFU, seconds per step."""
        left = timedelta(seconds=round((self.steps - step - 1) * seconds))
        used = "" if mfu is None else f", MFU {mfu:.1%}"
        text = f"loss {nll:.4f}, lr {lr:.2e}, {rate:,.0f} tokens/s{used}, {left} left"
        if self.console.is_terminal:
            self._bar.update(self._task, completed=step + 1, description=text)
        elif step % self.log_every == 0 or step == self.steps - 1:
            self.console.print(f"step {step}/{self.steps}: {text}", markup=False, highlight=False)

    def say(self, text: str) -> None:
        """One message above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.stop()


def make_console(quiet: bool = False) -> Console:
    """Standard output, or nothing; lines are never cut to a width where it is not a terminal."""
    if quiet:
        return Console(quiet=True)
    return Console() if sys.stdout.isatty() else Console(width=200, soft_wrap=True)
