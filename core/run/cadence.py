"""When a run evaluates, samples and saves, and how several processes come to do so at the same step."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Cadence(NamedTuple):
    """Updates between evaluations, samples and checkpoints; 0: no samples, and only the last evaluation."""

    evaluate: int
    sample: int
    save: int


class Due(NamedTuple):
    """What is to be done before an update, in this order."""

    evaluate: bool
    sample: bool
    save: bool


def choose_cadence(config: Any, steps: int) -> Cadence:
    """What the settings say, and a tenth of the run where they say nothing."""
    tenth = max(1, math.ceil(steps / 10))
    evaluate = tenth if config.eval_every is None else config.eval_every
    sample = (evaluate or tenth) if config.sample_every is None else config.sample_every
    return Cadence(evaluate, sample, tenth if config.save_every is None else config.save_every)


def find_due(cadence: Cadence, step: int, last: bool, late: bool) -> Due:
    """What is due before update `step`.

    last: the run ends here. late: so much time has passed since the last checkpoint that one is due.
    """
    return Due(
        evaluate=last or (cadence.evaluate > 0 and step % cadence.evaluate == 0),
        sample=cadence.sample > 0 and (last or step % cadence.sample == 0),
        save=step > 0 and (late or step % cadence.save == 0),
    )


def sample_length(step: int) -> int:
    """New tokens of a sample: few from a model that has not been trained."""
    return 96 if step else 16


class Flags(NamedTuple):
    """What a process may raise for all to hear."""

    stop: bool = False
    """It was asked to stop."""
    late: bool = False
    """A save is late."""
    steer: bool = False
    """A command has come to the first process (core/run/steering.py)."""


NO_FLAGS = Flags()


class Agreement:
    """Whether to stop, whether a save is late and whether there is a command, the same in every process.

    Signals reach single processes, and clocks differ; but all must stop, or save, at the same step. So a
    process raises a flag for each (`flags`), and does what all have heard (`hear`).
    """

    def __init__(
        self,
        save_minutes: float,
        interrupted: Callable[[], bool],
        commanded: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.stop = self.late = self.steer = False
        self._save_minutes, self._interrupted = save_minutes, interrupted
        self._commanded, self._clock = commanded, clock
        self._last_save = clock()

    def flags(self) -> Flags:
        """Those of this process."""
        late = self._clock() - self._last_save > 60 * self._save_minutes
        return Flags(self._interrupted(), late, self._commanded())

    def hear(self, stop: bool, late: bool, steer: bool) -> None:
        """Takes the flags that are set in any of the processes."""
        self.stop |= stop
        self.late |= late
        self.steer = steer

    def saved(self) -> None:
        """Notes that a save has begun: none is late."""
        self.late, self._last_save = False, self._clock()
