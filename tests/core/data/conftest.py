"""Documents are tokenised in threads of this process: starting one takes most of a small test's time."""

import contextlib
import os
import threading

import pytest

from core.data import workers

START = workers.start_process


class Worker:
    """What `core.data.workers` uses of a process."""

    def __init__(self) -> None:
        (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
        self.stdin, self.stdout = os.fdopen(write_in, "wb"), os.fdopen(read_out, "rb")
        self._ends = os.fdopen(read_in, "rb"), os.fdopen(write_out, "wb")
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        source, sink = self._ends
        with source, sink:
            workers.work(source, sink)

    def kill(self) -> None:
        """Its input ends. What it has not read is lost, as a killed process loses it."""
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()

    def wait(self) -> int:
        """For its end; its exit code."""
        self._thread.join()
        self.stdout.close()
        return 1


@pytest.fixture(autouse=True)
def threads_as_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "start_process", Worker)


@pytest.fixture
def real_workers(threads_as_workers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes, for what a thread does not prove."""
    monkeypatch.setattr(workers, "start_process", START)
