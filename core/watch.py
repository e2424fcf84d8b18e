"""How the processes of one run hear of each other's end, whatever each of them is doing.

A thread of every process gives a sign of life and looks for the others'. JAX's own heartbeat would abort the
survivors where they stand: the first in the middle of committing a checkpoint, and all with a stack of C++.
Here they finish a commit that is under way, say in one sentence what has happened, and end.
"""

import contextlib
import sys
import threading
import time
from typing import Any

from core.errors import end_at_once

PERIOD = 1.0  # seconds between two looks
GOODBYE = 5.0  # seconds that the first, whose end takes the others' connection away, waits for them to end
PATIENCE = 7 * 86400  # seconds to wait for what the others do: the watch ends a wait for one that is gone
WAY_OUT = "the last checkpoint is kept; start all of them again"
LIVES, FAILURES, ENDS = "mtlm/lives/", "mtlm/failures/", "mtlm/ends/"


class Watch:
    """Watches the other processes from a thread, from its making until `leave`."""

    def __init__(self, client: Any, rank: int, size: int, silence: float):
        """client: JAX's, of the key-value store that the first process keeps for all of them.

        silence: seconds without a sign of life after which a process is taken for dead.
        """
        self._client, self._rank, self._size, self._silence = client, rank, size, silence
        self._stopped = threading.Event()
        self._ending = threading.Lock()
        self.committing = threading.Lock()
        """Held while a checkpoint is being committed: this process does not end meanwhile."""
        self._seen = {other: ("", time.monotonic()) for other in range(size) if other != rank}
        self._thread = threading.Thread(name="watch", target=self._run, daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Ends the watch of a process that has done its work, when all have: nobody misses one that left."""
        self._client.wait_at_barrier("mtlm/leaving", PATIENCE * 1000)
        self._stopped.set()
        self._thread.join()

    def fail(self, sentence: str, code: int) -> None:
        """Ends this process, with `sentence` for the others to hear."""
        with self._ending, contextlib.suppress(Exception):  # the others may be gone, and the first with them
            self._client.key_value_set(f"{FAILURES}{self._rank}", f"{code} {sentence}")
        self._end(code)

    def say_and_end(self, sentence: str, code: int = 1) -> None:
        """Ends this process for what has become of another one; does not return."""
        self._ending.acquire()  # never given back: only one thread comes here
        with self.committing:
            pass
        with contextlib.suppress(OSError, ValueError):
            print(f"error: {sentence}", file=sys.stderr)
        self._end(code)

    def heard(self) -> tuple[str, int] | None:
        """What ended another process, as a sentence, and its exit code; None while nothing did."""
        failures = self._client.key_value_dir_get(FAILURES)
        for key, value in failures:
            if int(key.rpartition("/")[2]) != self._rank:
                code, _, why = value.partition(" ")
                return f"process {key.rpartition('/')[2]} of this run has ended: {why}", int(code)
        return None

    def _run(self) -> None:
        count = 0
        while not self._stopped.wait(PERIOD):
            count += 1
            try:
                self._client.key_value_set(f"{LIVES}{self._rank}", str(count), allow_overwrite=True)
                heard = self.heard()
                lost = None if heard else self._lost()
            except Exception:  # the first is gone or busy: what it is comes with the next look, or from JAX
                continue
            if heard:
                self.say_and_end(*heard)
            if lost is not None:
                self.say_and_end(
                    f"another process of this run has ended (process {lost} has not responded for "
                    f"{self._silence:.0f} s): {WAY_OUT}"
                )

    def _lost(self) -> int | None:
        """The process that has been silent for too long."""
        lives = {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(LIVES)}
        now = time.monotonic()
        for other, (before, since) in self._seen.items():
            life = lives.get(other, "")
            if life != before:
                self._seen[other] = (life, now)
            elif now - since > self._silence:
                return other
        return None

    def _end(self, code: int) -> None:
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{ENDS}{self._rank}", "", allow_overwrite=True)
            deadline = time.monotonic() + GOODBYE
            while self._rank == 0 and time.monotonic() < deadline:
                if len(self._client.key_value_dir_get(ENDS)) == self._size:
                    break
                time.sleep(0.1)
        end_at_once(code)
