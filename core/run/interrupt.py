"""SIGTERM and Ctrl-C, noted when they come and acted on where it is safe."""

import os
import signal
import sys
from types import FrameType

EXIT_FINISHED = 0
EXIT_SAVED = 3
"""Interrupted; the state was saved."""
EXIT_KEPT = 4
"""Interrupted; nothing newer than the last checkpoint was saved."""
EXIT_HALTED = 5
"""The guard ended the run; its state was saved, and older good checkpoints are kept."""


class Interrupt:
    """While it is entered, the first SIGTERM or Ctrl-C only sets `requested`; a second one ends the
    process at once, which loses what came after the last checkpoint and damages nothing: checkpoints
    are renamed into place when complete."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if self.requested:
            os.write(2, f"\n{name} again: quitting now; the last checkpoint is kept\n".encode())
            os._exit(EXIT_KEPT)
        self.requested = name
        text = (
            f"\n{name}: saving a checkpoint, then stopping "
            "(again: quit now and lose the steps since the last checkpoint)"
        )
        print(text, file=sys.stderr, flush=True)
