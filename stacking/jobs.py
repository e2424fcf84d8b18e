"""Runs commands of ours as processes, several at a time, each when what it needs is done.

A job that is done already is not run again, so a list of jobs that was stopped continues where it was.
"""

import dataclasses
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path

from rich.console import Console

from core.cli import command
from core.errors import UserError

# Starts a module so that it gets a SIGTERM, and saves its state, when the process that started it has died,
# however it did. The new process asks for that itself: preexec_fn would run in a fork of one with threads.
LAUNCH = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None)
if hasattr(libc, "prctl"):  # Linux
    libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the command that started this has ended")
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """One process."""

    name: str
    """Unique; a path relative to the folder of logs."""
    command: tuple[str, ...]
    """A module of ours and its arguments."""
    done: Callable[[], bool]
    needs: tuple[str, ...]
    """Names of the jobs that must be done before."""
    cost: float
    """FLOPs, for the time left."""
    before: Callable[[], None] = lambda: None
    """Called just before the process starts."""


def run_jobs(
    jobs: list[Job], out: Path, at_once: int, gpus: tuple[int, ...], console: Console, dry_run: bool
) -> None:
    """Runs all jobs that are not done; their output goes to `out`/logs.

    Args:
        jobs: jobs that several need may stand in it several times; what they need stands before them.
        at_once: processes at a time, on each of `gpus` if any are named.

    Raises:
        UserError: a job failed; the others that do not need it are done first.
    """
    unique = {job.name: job for job in jobs}
    open_jobs = {name: job for name, job in unique.items() if not job.done()}
    total = sum(job.cost for job in open_jobs.values())
    console.print(f"{len(open_jobs)} of {len(unique)} jobs to do, {total:.3g} FLOPs", highlight=False)
    if dry_run:
        for job in open_jobs.values():
            console.print(f"  {job.name}: {command(*job.command)}", markup=False, highlight=False)
        return
    slots: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for _ in range(at_once):
        for gpu in gpus or (None,):
            slots.put(gpu)
    running: dict[Future, Job] = {}
    processes = Processes(out, 0.9 / at_once)
    failed: dict[str, str] = {}
    started, spent = time.monotonic(), 0.0
    pool = ThreadPoolExecutor(at_once * max(1, len(gpus)))
    try:
        while open_jobs or running:
            for name, job in list(open_jobs.items()):
                if any(need in failed for need in job.needs):
                    failed[name] = f"needs {job.needs[0]}"
                    del open_jobs[name]
                elif job.done():  # a run that it needs was halted by its guard
                    spent += job.cost
                    del open_jobs[name]
                elif not {*open_jobs, *(other.name for other in running.values())}.intersection(job.needs):
                    del open_jobs[name]
                    running[pool.submit(processes.run, job, slots)] = job
            if not running:
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                problem = future.result()
                spent += job.cost
                elapsed = time.monotonic() - started
                left = timedelta(seconds=round(elapsed / spent * (total - spent))) if spent else "?"
                if problem:
                    failed[job.name] = problem
                to_go = f"{len(open_jobs) + len(running)} to go, about {left} left"
                console.print(f"{problem or 'done'}: {job.name} ({to_go})", markup=False, highlight=False)
    except BaseException:  # Ctrl-C among others: the runs save what they have
        processes.stop()
        raise
    finally:
        pool.shutdown()
    if failed:
        name, problem = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} job{'s' * (len(failed) > 1)} failed, first {name} ({problem}): see "
            f"{out / 'logs' / name}.log, fix the cause, and run the same command again"
        )


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "none")


class Processes:
    """Starts the processes of jobs, and stops those that are running."""

    def __init__(self, out: Path, memory: float) -> None:
        """memory: the part of a GPU that each process may take."""
        self._out, self._memory = out, memory
        self._lock = threading.Lock()
        self._on: set[subprocess.Popen] = set()
        self._stopped = False

    def run(self, job: Job, slots: "queue.SimpleQueue[int | None]") -> str | None:
        """Runs a job in the next free slot; None, or what went wrong in a few words."""
        gpu = slots.get()
        try:
            log = self._out / "logs" / f"{job.name}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            job.before()
            with log.open("ab") as output:
                process = self._start(job, gpu, output)
                if process is None:
                    return "stopped"
                code = process.wait()
            with self._lock:
                self._on.discard(process)
            return None if job.done() else f"exit code {code}, its last words: {_last_line(log)}"
        finally:
            slots.put(gpu)

    def stop(self) -> None:
        """Has every process end as Ctrl-C would, and no other start."""
        with self._lock:
            self._stopped = True
            for process in self._on:
                process.send_signal(signal.SIGTERM)

    def _start(self, job: Job, gpu: int | None, output: object) -> subprocess.Popen | None:
        environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{self._memory:.2f}"}
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(self._out.absolute() / "compiled"))
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        with self._lock:
            if self._stopped:
                return None
            process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, str(os.getpid()), *job.command], env=environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            self._on.add(process)
            return process
