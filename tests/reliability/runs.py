"""Runs that are killed, interrupted, or refused by their disk: what is left resumes to the same losses.

The run is tiny, and its evaluations, samples and checkpoints are frequent. Half of the moments are drawn
evenly over the time of a whole run, most of which is imports and compilation, half over that of its loop.
"""

import contextlib
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from core.checkpoint.manifest import verify
from core.checkpoint.steps import find_step, list_steps
from tests.train_tpu.processes import TINY, losses, run, start

LONG = (*TINY, "--steps", "60", "--eval-every", "20", "--save-every", "7", "--window", "16", "--lr", "0.003")


class Trial:
    """One run that is stopped again and again, and its uninterrupted twin."""

    def __init__(self, folder: Path, text: Path, seed: int = 0):
        self.cache, self.text, self.out = folder / "cache", text, folder / "run"
        self.rng = random.Random(seed)
        self.command = (*LONG, "--data", text)
        twin = folder / "uninterrupted"
        run(self.cache, *self.command, "--out", twin)
        shutil.rmtree(twin)
        began = time.monotonic()
        process = start(self.cache, *self.command, "--out", twin)
        wait_for_loop(process, twin, 0)
        loop = time.monotonic()
        process.communicate(timeout=300)
        self.seconds, self.loop_seconds = time.monotonic() - began, time.monotonic() - loop
        """Of a whole run whose programs are compiled already, and of its training loop."""
        self.expected = losses(twin)
        self._in_loop = False

    def stop(self, number: signal.Signals, twice: bool = False) -> tuple[int, str, str]:
        """Starts the run, or resumes it, and sends a signal at some moment; (exit code, stdout, stderr)."""
        logged = log_size(self.out)
        process = start(self.cache, *self.command, "--out", self.out)
        if self._in_loop:
            wait_for_loop(process, self.out, logged)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.rng.uniform(0, self.loop_seconds if self._in_loop else self.seconds))
        self._in_loop = not self._in_loop
        process.send_signal(number)
        if twice:
            time.sleep(self.rng.uniform(0, 0.5))
            process.send_signal(number)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def check(self) -> str:
        """Every checkpoint verifies; a finished run has the uninterrupted one's losses, to the bit."""
        for step in list_steps(self.out / "checkpoints"):
            verify(self.out / "checkpoints" / f"{step:08d}")
        if len(losses(self.out)) < len(self.expected):
            return "intact"
        assert_equal(losses(self.out), self.expected)
        shutil.rmtree(self.out)
        return "finished, equal to the bit"

    def finish(self) -> None:
        """Runs what is left to its end, and compares."""
        run(self.cache, *self.command, "--out", self.out)
        assert_equal(losses(self.out), self.expected)


def log_size(out: Path) -> int:
    """Bytes of a run's log; 0 where there is none."""
    path = out / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def wait_for_loop(process: subprocess.Popen, out: Path, logged: int) -> None:
    """Returns when the run's log is longer than `logged` bytes, as its loop begins, or when it has ended."""
    while log_size(out) <= logged and process.poll() is None:
        time.sleep(0.02)


def assert_equal(found: list, expected: list) -> None:
    """Raises if two runs do not have the same losses and gradient norms."""
    if found != expected:
        raise RuntimeError(f"the losses differ: {found[:3]} ... and {expected[:3]} ...")


def kill(folder: Path, text: Path, count: int) -> Counter[str]:
    """kill -9 at `count` moments; where the run was, counted."""
    trial, met = Trial(folder, text), Counter()
    for _ in range(count):
        code, out, _ = trial.stop(signal.SIGKILL)
        last = (out.strip().splitlines() or [""])[-1]
        if code == 0:
            met["over before the signal"] += 1
        elif not last:
            met["starting"] += 1
        elif "compiled" in out:
            met["steps, evaluations, samples, saves"] += 1
        else:
            met["preparing, restoring, compiling"] += 1
        if (trial.out / "checkpoints").is_dir():
            met[f"then: {trial.check()}"] += 1
    trial.finish()
    return met


def interrupt(folder: Path, text: Path, count: int) -> Counter[str]:
    """SIGINT and SIGTERM, once and twice, at `count` moments each; exit codes, counted."""
    trial, met = Trial(folder, text, seed=1), Counter()
    for number in (signal.SIGINT, signal.SIGTERM):
        for twice in (False, True):
            for _ in range(count):
                code, _, err = trial.stop(number, twice)
                if "Traceback" in err or code not in (0, 3, 4, 130, -signal.SIGTERM):
                    raise RuntimeError(f"exit code {code} after {number.name}: {err}")
                met[f"{number.name}{' twice' * twice}: exit code {code}"] += 1
                if (trial.out / "checkpoints").is_dir():
                    trial.check()
    trial.finish()
    return met


@contextlib.contextmanager
def disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of its own. Needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={kilobytes}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, text: Path, sizes: list[int]) -> Counter[str]:
    """A run on disks of some sizes in KB, each too small for it; then the disk grows, and the run ends."""
    trial, met = Trial(folder, text), Counter()
    for size in sizes:
        with disk(folder / "disk", size) as small:
            process = start(trial.cache, *trial.command, "--out", small / "run")
            _, err = process.communicate(timeout=300)
            lines = [line for line in err.splitlines() if line.strip()]
            if process.returncode != 2 or not any(line.startswith("error: ") for line in lines):
                raise RuntimeError(f"exit code {process.returncode} on {size} KB: {err}")
            steps = list_steps(small / "run/checkpoints")
            for step in steps:
                verify(small / f"run/checkpoints/{step:08d}")
            kept = f"step {steps[-1]} kept" if steps else "nothing saved yet"
            met[f"{size} KB: {len(lines)} line on stderr, {kept}"] += 1
            subprocess.run(["mount", "-o", "remount,size=1g", str(small)], check=True)
            run(trial.cache, *trial.command, "--out", small / "run")
            assert_equal(losses(small / "run"), trial.expected)
    return met


def read_only(folder: Path, text: Path) -> Counter[str]:
    """Every command that writes, given a place on a read-only file system: one sentence, exit code 2."""
    cache, met = folder / "cache", Counter()
    done, exported = folder / "done", folder / "exported"
    run(cache, *TINY, "--data", text, "--out", done)
    run(cache, done, exported, module="port_torch.convert")
    with disk(folder / "disk", 1024) as place:
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        commands = [
            ("train_tpu.run", *TINY, "--data", text, "--out", place / "run"),
            ("train_tpu.prepare", text, "--out", place / "data", "--tokenizer", "bytes", "--context", "32"),
            ("stacking.grow", done, "--out", place / "grown", "--schedule", "restart", "--steps", "24"),
            ("port_torch.convert", done, place / "exported"),
            ("port_torch.import_checkpoint", exported, place / "imported"),
            ("port_torch.train", "--data", text, "--tokenizer", "bytes", "--out", place / "torch"),
        ]
        for module, *arguments in commands:
            began = time.monotonic()
            _, err = run(cache, *arguments, module=module, expect=2)
            lines = [line for line in err.splitlines() if line.strip()]
            if len(lines) != 1 or not lines[0].startswith("error: "):
                raise RuntimeError(f"{module}: {err}")
            met[f"{module}: {lines[0]}"] += 1
            met["seconds of the slowest"] = max(
                met["seconds of the slowest"], round(time.monotonic() - began)
            )
        everything = {"MTLM_CACHE": str(place / "cache")}
        _, err = run(cache, *TINY, "--data", text, "--out", folder / "other", expect=2, environ=everything)
        met[f"the cache: {err.strip()}"] += 1
    if find_step(done) and (folder / "other").exists():
        raise RuntimeError("a run folder was made for a run that never began")
    return met
