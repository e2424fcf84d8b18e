"""Runs commands of ours as processes, several at a time, each when what it needs is done.

A job that is done already is not run again, so a list of jobs that was stopped continues where it was.
"""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path

from rich.console import Console

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
# Seconds after the end of a budget in which a process may save; what compiles has nothing to save.
GRACE = 20.0


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
    after: Callable[[float], None] = lambda seconds: None
    """Called when the job is done, with the seconds that its process took."""
    outcome: Callable[[], str] = lambda: "done"
    """What is said of the job when it is done."""
    seconds: Callable[[], float | None] = lambda: None
    """What its process is expected to take; None: nobody knows."""


class Budget:
    """What may be spent from now on. A job that cannot end within it is not started; at the end of the time,
    those that still run have GRACE seconds to save their state and end."""

    def __init__(self, minutes: float | None = None, flops: float | None = None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._flops = flops

    def seconds_left(self) -> float:
        """As many as a thread can wait for, where there is no limit."""
        return threading.TIMEOUT_MAX if self._end is None else self._end - time.monotonic()

    def take(self, job: Job) -> bool:
        """Whether a job fits; its FLOPs are spent then."""
        if self._flops is not None and job.cost > self._flops:
            return False
        if self.seconds_left() <= (job.seconds() or 0.0):
            return False
        if self._flops is not None:
            self._flops -= job.cost
        return True


def run_jobs(
    jobs: list[Job],
    out: Path,
    at_once: int,
    gpus: tuple[str, ...],
    console: Console,
    budget: Budget | None = None,
) -> bool:
    """Runs all jobs that are not done, in their order; their output goes to `out`/logs.

    Args:
        jobs: jobs that several need may stand in it several times; what they need stands before them.
        at_once: processes at a time, on each of `gpus` if any are named.

    Returns:
        Whether all are done; False where the budget left some out.

    Raises:
        UserError: a job failed; the others that do not need it are done first.
    """
    unique = {job.name: job for job in jobs}
    todo = {name: job for name, job in unique.items() if not job.done()}
    total = sum(job.cost for job in todo.values())
    console.print(f"{len(todo)} of {len(unique)} jobs to do, {total:.3g} FLOPs", highlight=False)
    deal = _Deal(
        todo, out, [gpu for _ in range(at_once) for gpu in gpus or (None,)], budget or Budget(), console
    )
    try:
        deal.run(0.9 / at_once)
    finally:
        deal.pool.shutdown()
    if deal.failed:
        name, problem = next(iter(deal.failed.items()))
        raise UserError(
            f"{len(deal.failed)} job{'s' * (len(deal.failed) > 1)} failed, first {name} ({problem}): see "
            f"{out / 'logs' / name}.log, fix the cause, and run the same command again"
        )
    return not deal.left


class _Deal:
    """Jobs, and the places where they run."""

    def __init__(
        self, todo: dict[str, Job], out: Path, slots: list[str | None], budget: Budget, console: Console
    ) -> None:
        self.failed: dict[str, str] = {}
        self.left: dict[str, Job] = {}
        """Jobs that the budget leaves out."""
        self.pool = ThreadPoolExecutor(len(slots))
        self._todo, self._out, self._slots, self._console = todo, out, slots, console
        self._budget, self._began = budget, time.monotonic()
        self._running: dict[Future, tuple[Job, str | None]] = {}
        self._total, self._done = sum(job.cost for job in todo.values()), 0.0

    def run(self, memory: float) -> None:
        """Runs them. memory: the part of a GPU that each process may take."""
        processes = Processes(self._out, memory)
        try:
            while self._todo or self._running:
                self._start(processes)
                if not self._running:  # what is left does not fit, and nothing that ends will change that
                    self._leave(*self._todo)
                    break
                ended = wait(self._running, max(0.0, self._budget.seconds_left()), FIRST_COMPLETED).done
                for future in ended:
                    self._end(future)
                if not ended:  # the time is up
                    self._say("the time is up: what still runs saves its state")
                    processes.stop()
                    self._leave(*self._todo)
                    if wait(self._running, GRACE).not_done:
                        processes.kill()
                    for future in wait(self._running).done:
                        job, _ = self._running.pop(future)
                        if job.done():
                            job.after(future.result()[1])
                        else:
                            self.left[job.name] = job
        except BaseException:  # Ctrl-C among others: the runs save what they have
            processes.stop()
            raise

    def _start(self, processes: "Processes") -> None:
        """Starts what can start now, in order. What cannot end within the budget waits: how long it takes may
        be known better once another has ended."""
        for name, job in list(self._todo.items()):
            if any(need in self.failed for need in job.needs):
                self.failed[name] = f"needs {job.needs[0]}"
                del self._todo[name]
            elif job.done():  # a run that it needs was halted by its guard
                self._done += job.cost
                del self._todo[name]
                job.after(0.0)
                self._report(job.outcome(), job)
            elif self._slots and not self._unfinished().intersection(job.needs) and self._budget.take(job):
                del self._todo[name]
                gpu = self._idlest()
                self._running[self.pool.submit(processes.run, job, gpu)] = job, gpu

    def _unfinished(self) -> set[str]:
        return {*self._todo, *(job.name for job, _ in self._running.values())}

    def _idlest(self) -> str | None:
        """Takes a free place, on the GPU with the fewest jobs: two never share one while another idles."""
        busy = [gpu for _, gpu in self._running.values()]
        gpu = min(self._slots, key=busy.count)
        self._slots.remove(gpu)
        return gpu

    def _leave(self, *names: str) -> None:
        for name in names:
            self.left[name] = self._todo.pop(name)

    def _end(self, future: Future) -> None:
        job, gpu = self._running.pop(future)
        self._slots.append(gpu)
        problem, seconds = future.result()
        self._done += job.cost
        if problem:
            self.failed[job.name] = problem
        else:
            job.after(seconds)
        self._report(problem or job.outcome(), job)

    def _report(self, outcome: str, job: Job) -> None:
        """Says how a job has ended, and what is left."""
        elapsed = time.monotonic() - self._began
        rest = self._total - self._done - sum(left.cost for left in self.left.values())
        to_go = f"{len(self._todo) + len(self._running)} to go"
        if self._done:
            to_go += f", about {timedelta(seconds=round(elapsed / self._done * max(0.0, rest)))} left"
        self._say(f"{outcome}: {job.name} ({to_go})")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False)


class Processes:
    """Starts the processes of jobs, and stops those that are running."""

    def __init__(self, out: Path, memory: float) -> None:
        """memory: the part of a GPU that each process may take."""
        self._out, self._memory = out, memory
        self._lock = threading.Lock()
        self._on: set[subprocess.Popen] = set()
        self._stopped = False

    def run(self, job: Job, gpu: str | None) -> tuple[str | None, float]:
        """Runs a job on a GPU; None, or what went wrong in a few words, and the seconds that it took."""
        log = self._out / "logs" / f"{job.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with log.open("ab") as output:
            try:
                job.before()
            except (UserError, OSError) as error:  # of this job alone
                output.write(f"{error}\n".encode())
                return str(error), 0.0
            process = self._start(job, gpu, output)
            if process is None:
                return "stopped", 0.0
            code = process.wait()
        with self._lock:
            self._on.discard(process)
        problem = None if job.done() else f"exit code {code}, its last words: {_last_line(log)}"
        return problem, time.monotonic() - began

    def stop(self) -> None:
        """Has every process end as Ctrl-C would, and no other start."""
        with self._lock:
            self._stopped = True
            for process in self._on:
                process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends every process that has not heeded `stop`."""
        with self._lock:
            for process in self._on:
                process.kill()

    def _start(self, job: Job, gpu: str | None, output: object) -> subprocess.Popen | None:
        environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{self._memory:.2f}"}
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(self._out.absolute() / "compiled"))
        if gpu is not None:  # which it may share with others
            environment |= {"CUDA_VISIBLE_DEVICES": gpu, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        with self._lock:
            if self._stopped:
                return None
            process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, str(os.getpid()), *job.command], env=environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            self._on.add(process)
            return process


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "none")


def visible_gpus(environ: Mapping[str, str], asked: tuple[int, ...] = ()) -> tuple[str, ...]:
    """The GPUs to spread processes over, as CUDA_VISIBLE_DEVICES names them; none where JAX uses none.

    asked: numbers that are to be used alone.

    Raises:
        UserError: one that is asked for is not there.
    """
    platforms = environ.get("JAX_PLATFORMS", "")
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    tool = shutil.which("nvidia-smi")
    found: tuple[str, ...] = ()
    if visible is not None:
        found = tuple(name for name in visible.split(",") if name and name != "-1")
    elif tool and (not platforms or "cuda" in platforms or "gpu" in platforms):
        listed = subprocess.run([tool, "--query-gpu=index", "--format=csv,noheader"], capture_output=True)
        found = tuple(listed.stdout.decode().split()) if listed.returncode == 0 else ()
    if missing := [gpu for gpu in map(str, asked) if gpu not in found]:
        raise UserError(
            f"--gpus {missing[0]}: the GPUs here are {', '.join(found) or 'none'}; name some of them, or "
            "leave --gpus out"
        )
    return tuple(map(str, asked)) or found
