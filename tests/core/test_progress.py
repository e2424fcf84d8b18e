"""What is said of what is going on, and when: on a clock that the tests move."""

import io
import sys
import threading

import pytest
from rich.console import Console

from core import progress
from core.progress import Activity


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """In place of the real one; nothing is looked at but when `tick` is called."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress._Display, "_run", lambda self: None)
    return clock


def tick(clock: Clock, activity: Activity, seconds: float, between: float = 0.25) -> None:
    """Lets time pass as the thread that looks after the display sees it, every 0.25 s."""
    for _ in range(round(seconds / between)):
        clock.now += between
        activity._display._refresh()


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def lines(of: Console) -> list[str]:
    return of.file.getvalue().splitlines()


def test_no_time_left_before_it_is_measured_and_then_the_right_one(clock):
    """The first unit waits for compilation: 60 s instead of 2."""
    with Activity("evaluating valid", 33, "windows", console=console()) as activity:
        assert activity.describe() == "evaluating valid 0/33 windows: 0:00:00"
        clock.now += 60
        activity.advance()
        assert activity.describe() == "evaluating valid 1/33 windows: 0:01:00"
        clock.now += 2
        activity.advance()
        assert "left" not in activity.describe()
        clock.now += 2
        activity.advance()
        assert activity.describe() == "evaluating valid 3/33 windows: 0.5 windows/s, 0:01:00 left"


def test_the_rate_is_a_recent_one(clock):
    with Activity("asking", 10_000, "tokens", console=console()) as activity:
        for rate in (100, 10):
            for _ in range(60):
                clock.now += 1
                activity.advance(rate)
    assert activity.describe() == "asking 6,600/10,000 tokens: 10 tokens/s, 0:05:40 left"


def test_what_is_done_aside_changes_neither_rate_nor_time_left(clock):
    """Wherever between units it happens, and whatever happens within it."""
    seen = []
    with Activity("step", 100, left="of updates left", console=console()) as activity:
        for step in range(20):
            if step % 5 == 0:
                with Activity("evaluating valid"):
                    clock.now += 100
                    with Activity("saving"):
                        clock.now += 10
                seen.append(activity.describe())
            clock.now += 3
            activity.advance()
    assert seen[1:] == [f"step: 0:04:{seconds} of updates left" for seconds in (45, 30, 15)]


def test_units_done_earlier_are_no_work_of_this_run(clock):
    with Activity("step", 100, "updates", done=90, console=console()) as activity:
        for _ in range(5):
            clock.now += 2
            activity.advance()
    assert activity.describe() == "step 95/100 updates: 0.5 updates/s, 0:00:10 left"


def test_without_a_terminal_what_is_short_leaves_no_line_and_what_is_long_leaves_few(clock):
    out = console()
    with Activity("saving step 5", console=out) as short:
        tick(clock, short, 1.75)
    assert lines(out) == []
    with Activity("compiling the step", console=out) as long:
        tick(clock, long, 25)
    assert lines(out) == [
        "compiling the step: 0:00:02", "compiling the step: 0:00:12", "compiling the step: 0:00:22",
    ]  # fmt: skip
    with Activity("tokenizing", console=out) as hours:
        tick(clock, hours, 7200, between=4)
    assert len(lines(out)) < 3 + 60


def test_lines_name_what_is_going_on(clock):
    out = console()
    with Activity("waiting for the first update", 9, console=out) as outer:
        with Activity("evaluating valid", 4, "windows") as inner:
            tick(clock, inner, 3)
        tick(clock, outer, 2)
        outer.name = "step 0/9"
        outer.advance(text="loss 5.0", line=True)
        outer.advance(text="loss 4.0", line=False)
        tick(clock, outer, 60)  # its lines are the caller's
        with Activity("saving step 2") as inner:
            tick(clock, inner, 11)
    assert lines(out) == [
        "evaluating valid 0/4 windows: 0:00:02", "waiting for the first update: 0:00:02",
        "step 0/9: loss 5.0", "saving step 2: 0:00:02",
    ]  # fmt: skip


def test_a_terminal_shows_all_that_goes_on_and_keeps_nothing(clock):
    out = console(terminal=True)
    with Activity("step 3/9", 9, console=out) as outer:
        outer.advance(text="loss [5.0]")
        tick(clock, outer, 1)
        with Activity("evaluating valid") as inner:
            tick(clock, inner, 1)
            assert (outer.work, inner.work) == (1, 1)
        shown = out.file.getvalue()
        out.print("said")
    assert "step 3/9" in shown and "loss [5.0]" in shown and "evaluating valid" in shown
    left = out.file.getvalue()[len(shown) :]
    assert left.index("said") < left.rindex("\x1b[2K")  # the lines below it are taken away


def test_what_is_printed_into_a_file_stays_there_while_a_terminal_shows_progress(clock, monkeypatch):
    out = console(terminal=True)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with Activity("sampling", console=out):
        print("text")
        assert sys.stdout.getvalue() == "text\n"
    assert "text" not in out.file.getvalue()


def test_threads_of_their_own_show_nothing(clock):
    out = console()

    def save() -> None:
        with Activity("hashing the files", console=out) as activity:
            clock.now += 5
            activity.advance()

    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
    assert lines(out) == []
    with Activity("hashing the files", console=out) as activity:
        clock.now += 5
        activity.advance()
    assert len(lines(out)) == 1
