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

TICK = 0.25  # seconds between two looks at what is being done
SEEN = 0.5  # seconds: what is over sooner is not shown on a terminal
SHORT = 2.0  # seconds: what is over sooner leaves no line elsewhere
LINE_EVERY = 10.0  # seconds between lines; a tenth of an activity's time if that is more
RECENT = 30.0  # seconds of work from which its rate is taken


class Activity:
    """Something that takes time, such as evaluating. A context manager; it is shown while it is entered.

    One within another is shown below it, and where the other is. In threads of their own nothing is shown.
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
        """name, total: what is being done, and its units, if known; both may change. done: those done before.

        unit: what is counted. Without one the numbers are not shown, but for the time left.
        left: what is said after the time left.
        console: where the outermost activity is shown. Default: standard error.
        """
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self.aside = 0.0
        """Seconds spent on activities within this one."""
        self.last_line: float | None = None
        """After how many seconds of work a line was printed."""
        self._left, self._console, self._text = left, console, ""
        self._marks: deque[tuple[float, float]] = deque()  # (seconds of work, units done then)
        self._rate: float | None = None  # units per second of work, once it is known
        self._inner: Activity | None = None
        self._paced = True  # whether lines are printed as time passes

    def __enter__(self) -> "Activity":
        self._began = time.monotonic()
        self._outer = _current.get()
        self._display = self._outer._display if self._outer else _open_display(self._console)
        _current.set(self)
        if self._outer:
            self._outer._inner = self
        if self._display:
            self._display.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.set(self._outer)
        if self._display:
            self._display.remove(self)
        if self._outer:
            self._outer.aside, self._outer._inner = self._outer.aside + self.seconds, None

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    @property
    def work(self) -> float:
        """Seconds since it began without those spent aside: its times and its rate are of these."""
        return self.seconds - self.aside - (self._inner.seconds if self._inner else 0)

    def advance(self, n: float = 1, text: str = "", line: bool | None = None) -> None:
        """Counts `n` more units as done.

        text: what to show instead of the rate. line: whether to print a line where there is no terminal;
        default: now and then.
        """
        self.done += n
        self._text, self._paced = text, line is None
        self._measure()
        if self._display:
            self._display.show(self, self.is_due() if line is None else line)

    def _measure(self) -> None:
        """From the end of the first unit on: what it waits for, compilation say, does not come again."""
        now, marks = self.work, self._marks
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
        name, rate, parts = self.name, self._rate, [self._text] if self._text else []
        if self.unit and (self.total or self.done):
            name += f" {self.done:,.0f}{f'/{self.total:,.0f}' if self.total else ''} {self.unit}"
        if rate and self.unit and not self._text:
            parts.append(f"{rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s")
        if rate and self.total:
            parts.append(f"{_duration((self.total - self.done) / rate)} {self._left}")
        return f"{name}: {', '.join(parts) or _duration(self.work)}"

    def is_due(self) -> bool:
        """Whether a line is to be printed now where there is no terminal."""
        now, last = self.work, self.last_line
        due = now >= SHORT if last is None else now - last >= max(LINE_EVERY, now / 10)
        return self._paced and due


_current: ContextVar[Activity | None] = ContextVar("activity", default=None)


class _Display:
    """Shows activities of the main thread, from the beginning of the outermost to its end."""

    def __init__(self, console: Console):
        self._console = console
        self._live = console.is_terminal and not console.is_dumb_terminal
        self._bars = Progress(
            BarColumn(bar_width=10),
            TextColumn("{task.description}", markup=False),
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # else what is printed into a file would go to the terminal
            redirect_stderr=sys.stderr.isatty(),
            disable=not self._live,
        )
        self._open: dict[Activity, TaskID] = {}
        self._lock = threading.RLock()
        self._ended = threading.Event()
        if self._live:
            self._bars.start()
            console.show_cursor(True)  # a process that is killed would leave it hidden
        threading.Thread(target=self._run, name="progress", daemon=True).start()

    def add(self, activity: Activity) -> None:
        with self._lock:
            self._open[activity] = self._bars.add_task(activity.name, total=activity.total, visible=False)

    def remove(self, activity: Activity) -> None:
        with self._lock:
            self._bars.remove_task(self._open.pop(activity))
            if not self._open:
                self._ended.set()
                self._bars.stop()

    def show(self, activity: Activity, line: bool) -> None:
        """Prints the activity's line, if `line`, where there is no terminal."""
        if line and not self._live:
            with self._lock:
                activity.last_line = activity.work
                self._console.print(activity.describe(), markup=False, highlight=False, soft_wrap=True)

    def _run(self) -> None:
        while not self._ended.wait(TICK):
            with self._lock, contextlib.suppress(OSError, ValueError):  # the main thread will meet them, too
                if self._open:
                    self._refresh()

    def _refresh(self) -> None:
        for activity, task in self._open.items():
            visible = activity.seconds >= SEEN
            self._bars.update(
                task, description=activity.describe(), completed=activity.done, total=activity.total,
                visible=visible,
            )  # fmt: skip
        self._bars.refresh()
        self.show(activity, activity.is_due())  # the innermost, which was opened last


def _open_display(console: Console | None) -> _Display | None:
    console = console or Console(stderr=True)
    shown = not console.quiet and threading.current_thread() is threading.main_thread()
    return _Display(console) if shown else None


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
