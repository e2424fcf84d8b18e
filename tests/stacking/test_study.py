"""A study of growth: what its table says, how its jobs run, and a whole one in the small."""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import core.run.data
from core.checkpoint.steps import list_steps, step_path
from core.errors import UserError
from core.progress import make_console
from core.run.log import read_log
from core.run.loop import END, HALT
from stacking.jobs import Job, run_jobs
from stacking.study import __main__ as command
from stacking.study import experiment, report
from stacking.study.arms import ArmKey, Study
from stacking.study.config import StudyConfig
from stacking.study.report import flops_to_reach, make_table
from stacking.study.results import Arm, Point
from tests.train_tpu.processes import ROOT, TINY, losses, run, start, without

# What the arms of a study are made of: every setting of TINY but those that the study gives.
TARGET = (
    *without(without(without(TINY, "--eval-every"), "--save-every"), "--steps"),
    *("--steps", "20", "--n-layers", "4", "--data"),
)
STUDY = ("--ops", "stack", "--fractions", "0.25", "--seeds", "0", "1", "--schedule", "rewarm:3")


def test_flops_are_read_off_between_decayed_runs_only():
    points = [(1e3, 4.0), (1e4, 3.0), (1e5, 2.5)]
    assert flops_to_reach(points, 3.5) == (pytest.approx(10**3.5), "=")
    assert flops_to_reach(points[::-1], 2.5) == (pytest.approx(1e5), "=")
    assert flops_to_reach(points, 4.2) == (1e3, "<")
    assert flops_to_reach(points, 2.4) == (1e5, ">")


def arm(op: str, seed: int, ends: list[tuple[int, float, float]], grown_at: int = 0) -> Arm:
    decayed = tuple(Point(steps, steps * 8, flops, {"valid": loss}) for steps, flops, loss in ends)
    return Arm(op, grown_at, seed, 1e-3, decayed, decayed)


def test_the_table_pairs_seeds_and_says_what_is_missing():
    arms = [
        arm("scratch", 0, [(80, 80.0, 3.2), (100, 100.0, 3.0)]),
        arm("scratch", 1, [(80, 80.0, 3.4), (100, 100.0, 3.2)]),
        arm("stack", 0, [(80, 60.0, 3.2), (100, 80.0, 3.1), (120, 100.0, 2.9)], 40),
        arm("stack", 1, [(80, 60.0, 3.4), (100, 80.0, 3.3), (120, 100.0, 3.1)], 40),
        arm("random", 0, [(80, 60.0, 3.3), (100, 80.0, 3.2), (120, 100.0, 3.1)], 40),
        arm("random", 1, [(80, 60.0, 3.5), (100, 80.0, 3.4)], 40),
    ]
    rows = {line.split(" | ")[0].strip("| "): line for line in make_table(arms, 100, "valid").splitlines()}
    assert "3.1000 ± 0.1000" in rows["scratch"] and "1.000" in rows["scratch"]
    # Both seeds lie 0.1 above their own scratch at equal tokens and 0.1 below at equal FLOPs; scratch's loss
    # is half-way between, at the geometric mean of 80 and 100: 10.6 % fewer FLOPs.
    for words in ("+0.1000 ± 0.0000", "0.800", "-0.1000 ± 0.0000", "-10.6 ± 0.0 %"):
        assert words in rows["stack at 40"], rows["stack at 40"]
    assert "+0.1000 (1 of 2 seeds)" in rows["random at 40"]
    assert "> +0.0 % (1 of 2 seeds)" in rows["random at 40"]


def make_job(folder, name: str, needs: tuple[str, ...] = (), fails: bool = False) -> Job:
    """A job that is done when a file is there, which a Python module of the standard library makes."""
    path = folder / f"{name}.zip"
    source = folder / "nothing"
    source.touch()
    arguments = ("zipfile", "-l" if fails else "-c", str(path), *([] if fails else [str(source)]))
    return Job(name, arguments, path.exists, needs, 1.0)


def test_jobs_run_when_what_they_need_is_done_and_only_once(tmp_path):
    console = make_console()
    jobs = [make_job(tmp_path, "a"), make_job(tmp_path, "b", ("a",)), make_job(tmp_path, "c", ("b",))]
    run_jobs([*jobs, *jobs], tmp_path, 2, (), console, dry_run=False)
    times = [(tmp_path / f"{name}.zip").stat().st_mtime_ns for name in "abc"]
    assert times == sorted(times)
    run_jobs(jobs, tmp_path, 2, (), console, dry_run=False)
    assert times == [(tmp_path / f"{name}.zip").stat().st_mtime_ns for name in "abc"]


def test_a_failed_job_is_named_and_the_others_are_done(tmp_path):
    jobs = [
        make_job(tmp_path, "bad", fails=True),
        make_job(tmp_path, "after", ("bad",)),
        make_job(tmp_path, "good"),
    ]
    words = r"2 jobs failed, first bad .exit code 1, its last words: FileNotFoundError.*logs/bad\.log"
    with pytest.raises(UserError, match=words):
        run_jobs(jobs, tmp_path, 1, (), make_console(), dry_run=False)
    assert (tmp_path / "good.zip").exists() and not (tmp_path / "after.zip").exists()
    assert "FileNotFoundError" in (tmp_path / "logs/bad.log").read_text()


def test_a_job_that_became_needless_is_not_run(tmp_path):
    """As what follows a run that its guard halted."""
    first = make_job(tmp_path, "a")
    after = Job("b", ("zipfile", "-l", "nowhere"), first.done, ("a",), 1.0)
    run_jobs([first, after], tmp_path, 1, (), make_console(), dry_run=False)
    assert first.done() and not (tmp_path / "logs/b.log").exists()


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
        "from core.progress import make_console\n"
        "job = Job('locking', ('locking',), lambda: False, (), 1.0)\n"
        f"run_jobs([job], Path({str(tmp_path)!r}), 1, (), make_console(), dry_run=False)\n"
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


@pytest.fixture
def study(cache, text, tmp_path, monkeypatch):
    """A study of three rates with nothing trained yet."""
    monkeypatch.setattr(core.run.data, "CACHE", cache / "data")
    config = StudyConfig(tmp_path, ("stack",), (0.25,), schedule="rewarm:3", lrs=(0.1, 0.2, 0.4), seeds=(0,))
    return Study(config, experiment.open_target(config, (*map(str, TARGET), str(text))))


def log(folder: Path, *rows: dict) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def finished(study: Study, key: ArmKey, loss: float | str) -> None:
    """The log of an arm's decayed run at equal tokens; its trunk has all forks."""
    steps = study.target.steps
    figures = dict.fromkeys(("perplexity", "bits_per_byte", "tokens", "scored_tokens"), 1.0)
    evaluated = {"step": steps, "kind": "eval", "split": "valid", "nll": loss, **figures}
    log(study.decayed(key, steps), evaluated, {"step": steps, "kind": "event", "what": END})
    trunk = study.folder(key) / "trunk"
    log(trunk)
    for length in study.lengths(key.grown_at):
        (step_path(trunk / "checkpoints", study.target.decay_start(length))).mkdir(parents=True)


def test_a_study_whose_rates_bracket_the_best_one_ends(study, tmp_path):
    """The largest rate was halted by the guard: that is its result, and nothing of it is left to do."""
    tuning = [key for lr in study.config.lrs for key in study.keys(0, lr)]
    halt = {"step": 3, "kind": "event", "what": HALT}
    for key in tuning:
        if key.lr == 0.4 and key.op == "scratch":
            log(study.folder(key) / "trunk", halt)
        elif key.lr == 0.4:  # before the growth
            log(study.base(key), halt)
        else:
            finished(study, key, {0.1: 3.0, 0.2: "nan"}[key.lr])
            if key.op != "scratch":
                step_path(study.base(key) / "checkpoints", key.grown_at).mkdir(parents=True)
    jobs = [job for key in tuning for job in study.jobs(key, (study.target.steps,))]
    assert [job.name for job in jobs if not job.done()] == []
    run_jobs(jobs, tmp_path, 1, (), make_console(), dry_run=False)
    assert experiment.tune(study, tuning) == {"scratch": 0.1, "stack-at-5": 0.1}


def test_a_study_without_a_finite_loss_chooses_no_rate(study):
    tuning = [key for lr in study.config.lrs for key in study.keys(0, lr)]
    for key in tuning:
        finished(study, key, "nan")
    with pytest.raises(
        UserError, match=r"scratch was trained at none of --lrs 0.1 0.2 0.4.*give smaller ones"
    ):
        experiment.tune(study, tuning)


def test_the_table_names_arms_that_were_halted(tmp_path, monkeypatch):
    arms = [arm("scratch", 0, [(80, 80.0, 3.2), (100, 100.0, 3.0)])]
    halted = Arm("stack", 40, 0, 0.5, (), (), halted=True)
    record = {
        "arms": [dataclasses.asdict(one) for one in arms], "run": {"steps": 100},
        "halted": [dataclasses.asdict(halted)],
    }  # fmt: skip
    (tmp_path / "study.json").write_text(json.dumps(record))
    monkeypatch.setattr(report, "plot", lambda *_: None)
    assert "Halted by the guard: stack at 40, seed 0, peak lr 0.5." in report.write_report(tmp_path, None)


def test_refusals(cache, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(core.run.data, "CACHE", cache / "data")

    def refused(*study, target=(*TARGET, text)):
        more = ("--out", tmp_path / "study", *study, "--", *target)
        monkeypatch.setattr(sys, "argv", ["study", *map(str, more)])
        with pytest.raises(UserError) as error:
            command.main()
        return str(error.value)

    assert "needs --steps" in refused(target=without([*TARGET, text], "--steps"))
    assert "4 layers cannot be reached by growing by a factor of 3" in refused("--factor", "3")
    assert "not settled before step 20" in refused("--schedule", "rewarm:10", "--fractions", "0.5")
    assert "must be wsd" in refused(target=(*TARGET, text, "--schedule", "cosine"))
    assert "holds out valid" in refused("--heldout", "books")
    assert "no decayed scratch run yet" in refused("--report", "--schedule", "rewarm:3")
    assert "another decay than scratch" in refused("--schedule", "restart")
    assert not (tmp_path / "study").exists()

    monkeypatch.setattr(sys, "argv", [*sys.argv[:3], "--schedule", "keep", "--dry-run", *sys.argv[5:]])
    assert command.main() == 0 and "stacking.grow" in capsys.readouterr().out


@pytest.mark.slow
def test_a_whole_study_stopped_on_the_way_and_resumed(cache, text, tmp_path):
    out = tmp_path / "study"
    command = (*STUDY, "--out", out, "--jobs", "2", "--lrs", "0.005", "0.01", "--", *TARGET, text)
    first = start(cache, *command, module="stacking.study")
    while not list(out.glob("seed-0/*/scratch/trunk/metrics.jsonl")):
        assert first.poll() is None
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGTERM)
    first.communicate(timeout=120)
    assert first.returncode == 130

    # Two dozen processes; on two cores that others use as well they may take long.
    printed, _ = run(cache, *command, module="stacking.study", timeout=1200)
    table = (out / "table.md").read_text()
    assert table in printed and (out / "study.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((out / "study.json").read_text())
    arms = {(a["op"], a["seed"]): Arm(**a) for a in record["arms"]}
    assert set(arms) == {(op, seed) for op in ("scratch", "stack") for seed in (0, 1)}
    assert len(record["tuning"]) == 4
    lrs = {a["lr"] for a in record["tuning"]}
    assert lrs == {0.005, 0.01}

    # Growing at step 5 of 20 to 4 layers out of 2: lengths early, equal tokens, equal FLOPs.
    stack = arms["stack", 0]
    steps = [point[0] for point in stack.decayed]
    flops = [point[2] for point in stack.decayed]
    scratch = arms["scratch", 0].decayed
    assert steps[:2] == [16, 20] and [point[0] for point in scratch] == [16, 20]
    assert flops[1] < scratch[-1][2]
    # Within half a step of scratch's FLOPs.
    assert abs(flops[2] - scratch[-1][2]) <= scratch[-1][2] / 20 / 2

    # A decayed run forked off a trunk is the run that had that length from the start.
    folder = out / "seed-1" / f"lr-{arms['scratch', 1].lr:g}" / "scratch"
    alone = tmp_path / "alone"
    seed = ("--seed", "1", "--lr", repr(arms["scratch", 1].lr), "--out", alone)
    run(cache, *TARGET, text, *seed, "--prompts")
    assert losses(folder / "trunk") == losses(alone)[:16]
    assert losses(folder / "decayed-20") == losses(alone)[16:]
    end = [row["nll"] for row in read_log(alone, "eval") if row["step"] == 20]
    np.testing.assert_array_equal(end, list(scratch_end(arms["scratch", 1]).values()))
    assert 16 in list_steps(folder / "trunk/checkpoints")

    again, _ = run(cache, *command, module="stacking.study")
    assert "0 of " in again and table in again


def scratch_end(arm: Arm) -> dict[str, float]:
    return arm.decayed[-1][3]
