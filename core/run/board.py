"""TensorBoard's events, written where the loop sees a write fail.

tensorboardX's SummaryWriter writes from a thread of its own, which prints a traceback after our sentence
when the disk is full, and its import loads PyTorch wherever that is installed, broken or not. So its event
file is written directly here, and PyTorch is kept out.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLUSH_SECONDS = 30  # new events reach the disk at least this often, if any come


class Board:
    """An event file in `folder`. TensorBoard hides what earlier files hold from step `resume_step` on."""

    def __init__(self, folder: Path, resume_step: int):
        with _without_torch():
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2

        self._proto, self._make = event_pb2, summary
        folder.mkdir(parents=True, exist_ok=True)
        self._file = event_file_writer.EventsWriter(str(folder / "events"))
        self._flushed = time.monotonic()
        self._write(resume_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers by their tags, such as train/loss."""
        parts = [self._make.scalar(tag, value) for tag, value in values.items()]
        if parts:
            for part in parts[1:]:
                parts[0].MergeFrom(part)
            self._write(step, summary=parts[0])

    def text(self, step: int, tag: str, text: str) -> None:
        """A text in Markdown."""
        self._write(step, summary=self._make.text(tag, text))

    def close(self) -> None:
        """Writes out what is buffered."""
        self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        self._file.write_event(self._proto.Event(wall_time=time.time(), step=step, **content))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Within it `import torch` fails as if it were not installed, unless it has been imported already."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to refuse an import
    try:
        yield
    finally:
        del sys.modules["torch"]
