"""Processes that make pieces of tokens and write shards of windows, dealt one task at a time.

One is `python -m core.data.workers`, fed through its stdin and read from its stdout. It imports a tokenizer
and nothing of JAX, and its stdin ends when its parent does, however that dies. It has a few files open: those
of the part that it reads, and one that it writes.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO

from core.data.packing import Shard, write_shard
from core.data.pieces import Job, PieceMaker
from core.errors import UserError

Task = tuple[int, int] | Shard
"""A piece, by its part and number, or a shard."""


class Workers:
    """Processes for a job, each started when it has something to do. Leaving this context ends them."""

    def __init__(self, n: int, job: Job) -> None:
        self._job = job
        self._processes: list[subprocess.Popen | None] = [None] * n
        self._threads = ThreadPoolExecutor(n)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._end(range(len(self._processes)))
        self._threads.shutdown(cancel_futures=True)

    def results(self, next_task: Callable[[int], Task | None]) -> Iterator[tuple[Task, Any]]:
        """(task, what came of it), in the order in which they end.

        next_task: what an idle process does next, given its number; None for nothing as yet.
        Closing the iterator ends the processes that are not idle.
        """
        running: dict[Future, tuple[int, Task]] = {}
        idle = set(range(len(self._processes)))
        try:
            while True:
                for process in sorted(idle):
                    if (task := next_task(process)) is not None:
                        idle.remove(process)
                        running[self._threads.submit(self._do, process, task)] = process, task
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    process, task = running.pop(future)
                    idle.add(process)
                    yield task, future.result()
        finally:
            self._end([process for process, _ in running.values()])
            wait(running)

    def _do(self, number: int, task: Task) -> Any:
        process = self._processes[number]
        try:
            if process is None:
                process = self._processes[number] = start_process()
                _send(process.stdin, self._job)
            _send(process.stdin, task)
            result = _receive(process.stdout)
        except (BrokenPipeError, EOFError) as error:
            code = process.wait()
            if code >= 0:  # its own traceback is on stderr
                raise RuntimeError(f"a process that prepares data ended with code {code}") from error
            raise UserError(
                f"a tokenizing process was killed ({signal.Signals(-code).name}), as the system does when "
                "memory runs out: free some, or prepare the data with fewer processes (--workers N)"
            ) from error
        if isinstance(result, Exception):
            raise result
        return result

    def _end(self, numbers: Any) -> None:
        for number in numbers:
            if process := self._processes[number]:
                process.kill()
        for number in numbers:
            if process := self._processes[number]:
                process.wait()
                self._processes[number] = None


def start_process() -> subprocess.Popen:
    """A process that waits for its job."""
    # The packages are importable here because of where this process was started: the other one is told.
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "core.data.workers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )


def work(source: BinaryIO, sink: BinaryIO) -> None:
    """Does the tasks that come from `source`, after their job, and sends what comes of them to `sink`."""
    maker = None
    try:
        job = _receive(source)
        while True:
            task = _receive(source)
            try:
                if isinstance(task, Shard):
                    result = write_shard(task, job.folder)
                else:
                    maker = maker or PieceMaker(job)
                    result = maker.make(*task)
            except (UserError, OSError) as error:
                result = error
            _send(sink, result)
    except (EOFError, BrokenPipeError):
        return


def _send(stream: BinaryIO, message: Any) -> None:
    data = pickle.dumps(message)
    stream.write(len(data).to_bytes(8, "little"))
    stream.write(data)
    stream.flush()


def _receive(stream: BinaryIO) -> Any:
    size = stream.read(8)
    data = stream.read(int.from_bytes(size, "little"))
    if len(size) < 8 or len(data) < int.from_bytes(size, "little"):
        raise EOFError
    return pickle.loads(data)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    work(sys.stdin.buffer, sys.stdout.buffer)
