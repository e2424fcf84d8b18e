"""--profile in the loop: the trace is begun before its first update and written behind its last."""

from collections.abc import Callable
from pathlib import Path

from core.progress import Activity
from core.run.engine import Engine
from core.run.log import NoLog, RunLog
from core.run.profiling import FOLDER, describe, parse_updates


class Trace:
    """The updates that --profile names, none without it."""

    def __init__(self, asked: str | None, engine: Engine, out: Path):
        """
        Args:
            asked: as in "100:105".
            out: the run's folder.
        """
        self._first, self._after = parse_updates(asked) if asked else (None, None)
        self._engine, self._folder = engine, out / FOLDER
        self.running = False

    def begins_at(self, step: int) -> bool:
        """Whether update `step` is the first of it."""
        return step == self._first

    def ends_at(self, step: int) -> bool:
        """Whether it runs, and update `step` is no more of it."""
        return self.running and step >= self._after

    def begin(self) -> None:
        """To be called when no update is under way."""
        self._engine.start_profile(self._folder)
        self.running = True

    def end(self, step: int, log: RunLog | NoLog, say: Callable[[str], None]) -> None:
        """Writes it, after all updates before `step`, and says what they spent their time on."""
        self.running = False
        with Activity(f"writing the trace into {self._folder}"):
            operations = self._engine.stop_profile()
        made = step - self._first
        log.write(step, "event", what="profiled", updates=[self._first, step])
        say(f"traced {made} updates into {self._folder}; {describe(operations, max(1, made))}")
