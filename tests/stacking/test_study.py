"""A study of growth: what its table says, how its jobs run, and a whole one in the small."""

import json
import os
import signal
import sys
import time

import numpy as np
import pytest

from core.checkpoint import list_steps
from core.errors import UserError
from core.run.log import read_log
from stacking import study as command
from stacking.jobs import Job, run_jobs
from stacking.report import Arm, Point, flops_to_reach, make_table
from tests.train_tpu.processes import TINY, losses, run, start, without
from train_tpu.progress import make_console

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
    with pytest.raises(UserError, match=r"2 jobs were not done, first bad .exit code 1.*logs/bad\.log"):
        run_jobs(jobs, tmp_path, 1, (), make_console(), dry_run=False)
    assert (tmp_path / "good.zip").exists() and not (tmp_path / "after.zip").exists()
    assert "FileNotFoundError" in (tmp_path / "logs/bad.log").read_text()


def test_refusals(cache, text, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "CACHE", cache / "data")

    def refused(*study, target=(*TARGET, text)):
        more = ("--out", tmp_path / "study", *study, "--", *target)
        monkeypatch.setattr(sys, "argv", ["study", *map(str, more)])
        with pytest.raises(UserError) as error:
            command.main()
        return str(error.value)

    assert "needs --steps" in refused(target=without([*TARGET, text], "--steps"))
    assert "a target of 4 layers is no growth of anything by 3" in refused("--factor", "3")
    assert "not settled before step 20" in refused("--schedule", "rewarm:10", "--fractions", "0.5")
    assert "must be wsd" in refused(target=(*TARGET, text, "--schedule", "cosine"))
    assert "holds out valid" in refused("--heldout", "books")
    assert "no decayed scratch run yet" in refused("--report", "--schedule", "rewarm:3")
    assert not (tmp_path / "study").exists()


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
