"""Signals that end a run, and output that nobody reads any more: noted when they come, acted on where it is
safe."""

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_FINISHED = 0
EXIT_SAVED = 3
"""Interrupted; the state was saved."""
EXIT_KEPT = 4
"""Interrupted; nothing newer than the last checkpoint was saved."""
EXIT_HALTED = 5
"""The guard ended the run; its state was saved, and older good checkpoints are kept."""

GONE = (errno.EPIPE, errno.EIO)
"""What writing says when the reader of a pipe has ended, or the terminal has been closed."""


class Interrupt:
    """While it is entered, SIGTERM, Ctrl-C, SIGHUP and an output that nobody reads any more only set
    `requested`. A second SIGTERM or Ctrl-C ends the process at once, which loses what came after the last
    checkpoint and damages nothing: checkpoints are renamed into place when complete.

    SIGHUP is never that second one: of a closed terminal the kernel and the shell each send one, and a
    service manager may send it along with SIGTERM. Where it is ignored, as under nohup, it stays so.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._asked = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Interrupt":
        with contextlib.ExitStack() as stack:
            for name in ("stdout", "stderr"):
                stack.enter_context(_outliving_its_reader(name, self._note_gone))
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                stack.callback(signal.signal, number, signal.signal(number, self._note))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _note(self, number: int, _: FrameType | None) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if number == signal.SIGHUP:
            if self.requested:
                return
        elif self._asked:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{name} again: quitting now; the last checkpoint is kept\n".encode())
            os._exit(EXIT_KEPT)
        else:
            self._asked = True
        self.requested = name
        text = (
            f"\n{name}: saving a checkpoint, then stopping "
            "(again: quit now and lose the steps since the last checkpoint)"
        )
        print(text, file=sys.stderr, flush=True)

    def _note_gone(self, name: str) -> None:
        if self.requested:
            return
        self.requested = f"the end of what read its {name}"
        if name == "stdout":  # what stderr goes to may be gone as well: then this is lost, too
            print(
                "\nnobody reads stdout any more: saving a checkpoint, then stopping",
                file=sys.stderr,
                flush=True,
            )


@contextlib.contextmanager
def _outliving_its_reader(name: str, gone: Callable[[str], None]) -> Iterator[None]:
    """While it is entered, `sys.stdout` or `sys.stderr` fails no write for want of a reader: the first time
    `gone(name)` is called, and from then on what is written is dropped. A stream that something else has
    put in its place is left as it is."""
    stream = getattr(sys, name)
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # PYTHONUNBUFFERED leaves the buffer out
    if stream is not getattr(sys, f"__{name}__") or type(raw) is not io.FileIO:
        yield
        return
    output = _Output(raw.fileno(), lambda: gone(name))
    with contextlib.suppress(OSError):  # it comes again with the next write
        stream.flush()
    # Without a buffer between: a signal's handler may print while something else is printed.
    text = io.TextIOWrapper(
        output, encoding=stream.encoding, errors=stream.errors, line_buffering=True, write_through=True
    )
    setattr(sys, name, text)
    try:
        yield
    finally:
        setattr(sys, name, stream)
        text.detach()


class _Output(io.FileIO):
    """A file descriptor for writing that becomes that of the null device once nobody reads it any more."""

    def __init__(self, descriptor: int, gone: Callable[[], None]) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._gone = gone

    def write(self, data: bytes) -> int:
        left = memoryview(data)
        while left:
            try:
                left = left[super().write(left) :]
            except OSError as error:
                if error.errno not in GONE:
                    raise
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.fileno())
                os.close(null)
                self._gone()
        return len(data)
