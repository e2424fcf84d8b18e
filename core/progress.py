"""What a process is doing: live lines on a terminal while it lasts, elsewhere a plain line now and then."""

import contextlib
import sys
import threading
import time
from collections import deque
from contextvars import ContextVar
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

TICK = 0.25  # seconds between two looks at what is going on
SHORT = 0.5, 2.0  # seconds: what is over sooner is not shown on a terminal, and leaves no line elsewhere
LINE_EVERY = 10.0  # seconds between lines; a tenth of an activity's age if that is more
RECENT = 30.0  # seconds of work from which its rate is taken


class Activity:
    """Something that takes time, such as evaluating. A context manager; it is shown while it is entered.

    One within another is shown below it. The time that it takes counts neither for the rate nor for the time
    left of the outer one, and it is shown where the outer one is. In threads of their own nothing is shown.
    """

    def __init__(
        self,
        name: str,
        total: float | None = None,
        unit: str = "",
        *,
        done: float = 0,
        left: str = "left",
        console: Console | None = None,
    ):
        """name: what is going on; it may change. total: units of it, if known; done: those done earlier.

        unit: what is counted. Without a unit the numbers are not shown, but for the time left.
        left: what is said behind the time left.
        console: where the outermost activity is shown. Default: standard error.
        """
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self._left, self._console = left, console
        self._text = ""
        self._aside = 0.0  # seconds spent on activities within this one
        self._marks: deque[tuple[float, float]] = deque()  # (seconds of work, units done then)
        self._rate: float | None = None  # units per second, once it is known
        self._paced = True  # whether lines are printed as time passes
        self._last_line: float | None = None

    def __enter__(self) -> "Activity":
        self._began = time.monotonic()
        self._outer = _current.get()
        self._display = self._outer._display if self._outer else _Display(self._console)
        _current.set(self)
        self._display.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _current.set(self._outer)
        self._display.remove(self, failed=kind is not None)
        if self._outer:
            self._outer._aside += self.seconds

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    def advance(self, n: float = 1, text: str = "", line: bool | None = None) -> None:
        """Counts `n` more units as done.

        text: what to show instead of the rate. line: whether to print a line where there is no terminal;
        default: now and then.
        """
        self.done += n
        self._text, self._paced = text, line is None
        self._measure()
        self._display.show(self, line)

    def _measure(self) -> None:
        """From the end of the first unit on: what it waits for, compilation say, does not come again."""
        now, marks = self.seconds - self._aside, self._marks
        if marks and now - marks[-1][0] < TICK:
            return
        marks.append((now, self.done))
        while len(marks) > 3 and now - marks[0][0] > RECENT:
            marks.popleft()
        if len(marks) >= 3:
            (start, before), (end, after) = marks[0], marks[-1]
            self._rate = (after - before) / (end - start)

    def describe(self) -> str:
        """Its name, what is done, how fast, and the time left; the time taken while none of that is known."""
        rate, parts = self._rate, [self._text] if self._text else []
        if rate and self.unit and not self._text:
            parts.append(f"{rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s")
        if rate and self.total:
            parts.append(f"{_duration((self.total - self.done) / rate)} {self._left}")
        return f"{self._count()}: {', '.join(parts) or _duration(self.seconds)}"

    def _count(self) -> str:
        if not self.unit or not (self.total or self.done):
            return self.name
        of = f"/{self.total:,.0f}" if self.total else ""
        return f"{self.name} {self.done:,.0f}{of} {self.unit}"

    def line(self) -> str | None:
        """The line that is due now where there is no terminal."""
        age, last = self.seconds, self._last_line
        due = age >= SHORT[1] if last is None else age - last >= max(LINE_EVERY, age / 10)
        return self.describe() if self._paced and due else None

    def last_line(self) -> str | None:
        """The line at the end of an activity that has taken long."""
        long = self._paced and self._last_line is not None and self.seconds >= LINE_EVERY
        return f"{self._count()}: took {_duration(self.seconds)}" if long else None


_current: ContextVar[Activity | None] = ContextVar("activity", default=None)


class _Display:
    """Shows the activities of the main thread, from the beginning of the outermost to its end."""

    def __init__(self, console: Console | None):
        self._console = console = console or Console(stderr=True)
        self._open: dict[Activity, TaskID] = {}
        self._silent = console.quiet or threading.current_thread() is not threading.main_thread()
        self._live = console.is_terminal and not console.is_dumb_terminal
        self._bars = Progress(
            BarColumn(bar_width=10),
            TextColumn("{task.description}", markup=False),
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # else what is printed into a file would go to the terminal
            redirect_stderr=sys.stderr.isatty(),
        )
        self._lock = threading.RLock()
        self._ended = threading.Event()

    def add(self, activity: Activity) -> None:
        with self._lock:
            self._open[activity] = self._bars.add_task(activity.name, total=activity.total, visible=False)
            if len(self._open) == 1 and not self._silent:
                if self._live:
                    self._bars.start()
                    self._console.show_cursor(True)  # a process that is killed would leave it hidden
                threading.Thread(target=self._run, name="progress", daemon=True).start()

    def remove(self, activity: Activity, failed: bool) -> None:
        with self._lock:
            self._bars.remove_task(self._open.pop(activity))
            if not (failed or self._silent or self._live):
                self._print(activity, activity.last_line())
            if not self._open:
                self._ended.set()
                if self._bars.live.is_started:
                    self._bars.stop()

    def show(self, activity: Activity, line: bool | None) -> None:
        """Prints the activity's line, if there is no terminal: the one that is due where `line` is None."""
        if self._silent or self._live or line is False:
            return
        with self._lock:
            self._print(activity, activity.describe() if line else activity.line())

    def _print(self, activity: Activity, line: str | None) -> None:
        if line is not None:
            activity._last_line = activity.seconds
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _run(self) -> None:
        while not self._ended.wait(TICK):
            with self._lock, contextlib.suppress(OSError, ValueError):  # the main thread will meet them, too
                if self._open and not self._ended.is_set():
                    self._refresh()

    def _refresh(self) -> None:
        if not self._live:
            innermost = list(self._open)[-1]
            self._print(innermost, innermost.line())
            return
        for activity, task in self._open.items():
            visible = activity.seconds >= SHORT[0]
            self._bars.update(task, description=activity.describe(), completed=activity.done, visible=visible)
        self._bars.refresh()


def make_console(quiet: bool = False) -> Console:
    """Standard output, or nothing; lines are never cut to a width where it is not a terminal."""
    if quiet:
        return Console(quiet=True)
    return Console() if sys.stdout.isatty() else Console(width=200, soft_wrap=True)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
