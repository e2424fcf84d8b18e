"""What an evaluation prints while it runs: a live bar on a terminal, now and then a line elsewhere."""

import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

LINE_SECONDS = 10.0  # between lines where standard error is not a terminal


class Progress:
    """Progress on standard error: done of all, rate and time left."""

    def __init__(self, what: str, total: int, unit: str, quiet: bool = False):
        self._what, self._total, self._unit, self._quiet = what, total, unit, quiet
        self._done = self._tokens = 0
        self._started = self._last_line = time.monotonic()
        self._console = Console(stderr=True) if sys.stderr.isatty() and not quiet else None
        if self._console:
            columns = (
                TextColumn("{task.fields[what]}"),
                BarColumn(bar_width=30),
                TextColumn("{task.description}"),
            )
            self._bar = Bar(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=total, what=what)

    def __enter__(self) -> "Progress":
        if self._console:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._console:
            self._bar.stop()

    def advance(self, done: int, tokens: int) -> None:
        """`done` more are done, of that many tokens."""
        self._done += done
        self._tokens += tokens
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        left = timedelta(seconds=round((self._total - self._done) * seconds / self._done))
        rate = self._tokens / seconds
        text = f"{self._done:,}/{self._total:,} {self._unit}, {rate:,.0f} tokens/s, {left} left"
        if self._console:
            self._bar.update(self._task, completed=self._done, description=text)
        elif not self._quiet and now - self._last_line > LINE_SECONDS:
            self._last_line = now
            print(f"{self._what}: {text}", file=sys.stderr, flush=True)
