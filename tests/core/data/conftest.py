"""Documents are tokenised in threads of this process: starting one takes most of a small test's time."""

import os
import threading

import pytest

from core.data import packing

START = packing._start_worker


class Worker:
    """What `packing` uses of a tokenising process."""

    def __init__(self, tokenizer: str) -> None:
        (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
        self.stdin, self.stdout = os.fdopen(write_in, "wb"), os.fdopen(read_out, "rb")
        self._ends = os.fdopen(read_in, "rb"), os.fdopen(write_out, "wb")
        self._thread = threading.Thread(target=self._work, args=[tokenizer], daemon=True)
        self._thread.start()

    def _work(self, tokenizer: str) -> None:
        source, sink = self._ends
        with source, sink:
            packing._work(tokenizer, source, sink)

    def kill(self) -> None:
        """Its input ends."""
        self.stdin.close()

    def communicate(self) -> None:
        """Waits for its end."""
        self._thread.join()
        self.stdout.close()


@pytest.fixture(autouse=True)
def threads_as_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_start_worker", Worker)


@pytest.fixture
def real_workers(threads_as_workers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes, for what a thread does not prove."""
    monkeypatch.setattr(packing, "_start_worker", START)
