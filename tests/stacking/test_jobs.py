"""Jobs: in which order they run, what a budget leaves out, and that they end with what started them."""

import fcntl
import os
import subprocess
import sys
import time

import pytest

import stacking.jobs
from core.console import make_console
from core.errors import UserError
from stacking.jobs import Budget, Job, run_jobs, visible_gpus
from tests.train_tpu.processes import ROOT


def make_job(folder, name: str, needs: tuple[str, ...] = (), fails: bool = False, **more) -> Job:
    """A job that is done when a file is there, which a Python module of the standard library makes."""
    path = folder / f"{name}.zip"
    source = folder / "nothing"
    source.touch()
    arguments = ("zipfile", "-l" if fails else "-c", str(path), *([] if fails else [str(source)]))
    return Job(name, arguments, path.exists, needs, 1.0, **more)


def run(jobs: list[Job], folder, at_once: int = 1, budget: Budget | None = None) -> bool:
    return run_jobs(jobs, folder, at_once, (), make_console(), budget)


def test_jobs_run_when_what_they_need_is_done_and_only_once(tmp_path):
    jobs = [make_job(tmp_path, "a"), make_job(tmp_path, "b", ("a",)), make_job(tmp_path, "c", ("b",))]
    assert run([*jobs, *jobs], tmp_path, 2)
    times = [(tmp_path / f"{name}.zip").stat().st_mtime_ns for name in "abc"]
    assert times == sorted(times)
    assert run(jobs, tmp_path, 2)
    assert times == [(tmp_path / f"{name}.zip").stat().st_mtime_ns for name in "abc"]


def test_a_failed_job_is_named_and_the_others_are_done(tmp_path):
    jobs = [
        make_job(tmp_path, "bad", fails=True),
        make_job(tmp_path, "after", ("bad",)),
        make_job(tmp_path, "good"),
    ]
    words = r"2 jobs failed, first bad .exit code 1, its last words: FileNotFoundError.*logs/bad\.log"
    with pytest.raises(UserError, match=words):
        run(jobs, tmp_path)
    assert (tmp_path / "good.zip").exists() and not (tmp_path / "after.zip").exists()
    assert "FileNotFoundError" in (tmp_path / "logs/bad.log").read_text()


def test_a_job_that_became_needless_is_not_run(tmp_path, capsys):
    """As what follows a run that its guard halted. It is said how each ended."""
    first, told = make_job(tmp_path, "a", outcome=lambda: "halted"), []
    after = Job(
        "b", ("zipfile", "-l", "nowhere"), first.done, ("a",), 1.0, after=told.append,
        outcome=lambda: "not trained",
    )  # fmt: skip
    assert run([first, after], tmp_path)
    assert first.done() and not (tmp_path / "logs/b.log").exists() and told == [0.0]
    said = capsys.readouterr()
    lines = (said.out + said.err).splitlines()
    assert lines[-2].startswith("halted: a (1 to go, ") and lines[-1].startswith("not trained: b (0 to go, ")


def test_a_budget_leaves_out_what_does_not_fit_and_what_needs_it(tmp_path):
    """In minutes by what jobs are expected to take, in FLOPs by what they cost; smaller ones still run."""
    jobs = [
        make_job(tmp_path, "short", seconds=lambda: 1.0),
        make_job(tmp_path, "long", seconds=lambda: 90.0),
        make_job(tmp_path, "needs-long", ("long",)),
        make_job(tmp_path, "unknown"),
    ]
    assert not run(jobs, tmp_path, budget=Budget(minutes=1.0))
    made = sorted(path.stem for path in tmp_path.glob("*.zip"))
    assert made == ["short", "unknown"]
    other = tmp_path / "other"
    other.mkdir()
    assert not run([make_job(other, name) for name in "abc"], other, budget=Budget(flops=2.5))
    assert sorted(path.stem for path in other.glob("*.zip")) == ["a", "b"]


def test_at_the_end_of_the_time_what_runs_is_told_to_end(tmp_path, monkeypatch):
    """It gets a SIGTERM, after which training saves, and later a SIGKILL; what had not begun is left. One
    that is done by then has ended as any other, with the seconds that it took."""
    monkeypatch.setattr(stacking.jobs, "GRACE", 2.0)
    told = tmp_path / "told"
    (tmp_path / "patient.py").write_text(
        "import signal, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: open({str(told)!r}, 'w').close())\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    (tmp_path / "prompt.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(open(sys.argv[1], 'w').close()))\n"
        "time.sleep(600)\n"
    )
    saved, took = tmp_path / "saved", []
    patient = Job("patient", ("patient",), lambda: False, (), 1.0)
    prompt = Job("prompt", ("prompt", str(saved)), saved.exists, (), 1.0, after=took.append)
    began = time.monotonic()
    later = make_job(tmp_path, "later")
    assert not run([patient, prompt, later], tmp_path, 2, budget=Budget(minutes=0.1))
    assert told.exists() and not (tmp_path / "later.zip").exists()
    whole = time.monotonic() - began
    assert whole < 60  # not 600
    assert len(took) == 1 and 1 < took[0] < whole


def test_jobs_are_dealt_to_the_gpus_in_turn(tmp_path, monkeypatch):
    """Two processes on each of two GPUs, which do not take all of its memory at their start."""
    (tmp_path / "shows.py").write_text(
        "import os, sys\n"
        "names = ('PREALLOCATE', 'MEM_FRACTION')\n"
        "shown = [os.environ[f'XLA_PYTHON_CLIENT_{name}'] for name in names]\n"
        "open(sys.argv[1], 'w').write(' '.join([os.environ['CUDA_VISIBLE_DEVICES'], *shown]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    paths = [tmp_path / f"shown-{i}" for i in range(4)]
    jobs = [Job(path.name, ("shows", str(path)), path.exists, (), 1.0) for path in paths]
    assert run_jobs(jobs, tmp_path, 2, ("0", "3"), make_console())
    shown = sorted(path.read_text() for path in paths)
    assert shown == ["0 false 0.45"] * 2 + ["3 false 0.45"] * 2


def test_what_does_not_fit_waits_until_it_is_known_how_long_it_takes(tmp_path):
    """The first job shows that the second, expected to take longer than there is, does not."""
    first = make_job(tmp_path, "a")
    second = make_job(tmp_path, "b", seconds=lambda: 1.0 if first.done() else 90.0)
    assert run([second, first], tmp_path, budget=Budget(minutes=1.0)) and second.done()


def test_two_jobs_share_a_gpu_only_when_none_is_idle(tmp_path):
    """Both places of GPU 0 become free first; what starts then still finds GPU 1 idle."""
    deal = stacking.jobs._Deal({}, tmp_path, ["0", "0", "1", "1"], Budget(), make_console())
    taken = []
    for name in "abcd":
        taken.append(deal._idlest())
        deal._running[name] = make_job(tmp_path, name), taken[-1]
    deal.pool.shutdown()
    assert sorted(taken[:2]) == ["0", "1"] and sorted(taken) == ["0", "0", "1", "1"]


def test_a_job_that_cannot_be_prepared_fails_alone(tmp_path):
    def missing() -> None:
        raise FileNotFoundError("no such checkpoint")

    jobs = [make_job(tmp_path, "a", before=missing), make_job(tmp_path, "b")]
    with pytest.raises(UserError, match=r"1 job failed, first a \(no such checkpoint\)"):
        run(jobs, tmp_path)
    assert (tmp_path / "b.zip").exists()


def test_gpus_that_are_asked_for_must_be_there():
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "1,2"}) == ("1", "2")
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "1,2"}, (2,)) == ("2",)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == () == visible_gpus({"JAX_PLATFORMS": "cpu"})
    with pytest.raises(UserError, match=r"--gpus 3: the GPUs here are 1, 2;"):
        visible_gpus({"CUDA_VISIBLE_DEVICES": "1,2"}, (1, 3))
    with pytest.raises(UserError, match=r"--gpus 0: the GPUs here are none;"):
        visible_gpus({"JAX_PLATFORMS": "cpu"}, (0,))


def test_all_gpus_are_used_where_jax_is_not_told_otherwise(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 0\necho 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert visible_gpus({}) == visible_gpus({"JAX_PLATFORMS": "cuda,cpu"}) == ("0", "1")
    assert visible_gpus({"JAX_PLATFORMS": "cpu"}) == visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == ()


def test_jobs_end_with_the_process_that_started_them(tmp_path):
    """Killed by -9, it can tell them nothing; the lock of a run's folder must become free all the same."""
    lock = tmp_path / "lock"
    (tmp_path / "locking.py").write_text(
        "import fcntl, time\n"
        f"file = open({str(lock)!r}, 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "file.write('mine')\n"
        "file.flush()\n"
        "time.sleep(600)\n"
    )
    script = (
        "from pathlib import Path\n"
        "from stacking.jobs import Job, run_jobs\n"
        "from core.console import make_console\n"
        "job = Job('locking', ('locking',), lambda: False, (), 1.0)\n"
        f"run_jobs([job], Path({str(tmp_path)!r}), 1, (), make_console())\n"
    )
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | paths)
    while not lock.exists() or not lock.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits for it; a job that lived on would hold it for minutes
