"""Faults against real runs: kills, signals, damaged files, full disks."""

import functools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from core.checkpoint.manifest import verify
from core.checkpoint.steps import find_step, list_steps
from core.data.dataset import open_dataset
from core.run.folder import lock_folder
from core.run.interrupt import EXIT_KEPT, EXIT_SAVED
from core.run.log import read_log
from tests.train_tpu.processes import (
    TINY,
    losses,
    make_text,
    refusal,
    refusal_here,
    run,
    run_here,
    start,
    without,
)

# A window of 16 steps, so that the guard's memory is part of what must survive without refusing updates.
LONG = (*TINY, "--steps", "150", "--eval-every", "50", "--save-every", "7", "--window", "16", "--lr", "0.003")
SHORT = (  # with TINY's step, which other files of tests have compiled
    *TINY, "--steps", "30", "--eval-every", "10", "--save-every", "7", "--sample-every", "0", "--lr", "0.003",
)  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(cache, text):
    folder = cache / "uninterrupted"
    run(cache, *LONG, "--data", text, "--out", folder)
    return losses(folder)


@pytest.fixture(scope="module")
def short(cache, text):
    """The losses of a short run that nothing interrupts."""
    folder = cache / "short"
    run_here(*SHORT, "--data", text, "--out", folder)
    return losses(folder)


@pytest.fixture(scope="module")
def stopped(cache, text):
    """A short run that SIGTERM stopped, and what it said."""
    folder = cache / "stopped"
    said = run_here(
        *SHORT, "--data", text, "--out", folder, expect=EXIT_SAVED,
        moment="step 10/30", then=functools.partial(os.kill, os.getpid(), signal.SIGTERM),
    )  # fmt: skip
    return folder, *said


def wait_for(process: subprocess.Popen, pattern: str) -> str:
    """Reads the process's output up to the first line with `pattern`."""
    for line in process.stdout:
        if re.search(pattern, line):
            return line
    raise AssertionError(f"the process ended without {pattern!r}: {process.stderr.read()}")


def stop_at(step: int, cache: Path, command: tuple) -> None:
    """Starts a `LONG` run and has it save and end just behind a step."""
    process = start(cache, *command)
    wait_for(process, f"step {step}/150")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)


def kill_at_random(cache: Path, text: Path, folder: Path, kills: int) -> int:
    """Kills a run `kills` times at random moments of its training and finishes it; how often it resumed.

    A moment is a number of lines of output (a step each, mostly) and some milliseconds, so that slow
    machines kill as far into the training as fast ones.
    """
    rng = random.Random(0)
    resumed = 0
    for _ in range(kills):
        process = start(cache, *LONG, "--data", text, "--out", folder)
        resumed += "resuming" in wait_for(process, "starting|resuming")
        if "has finished" in wait_for(process, "compiled|has finished"):
            process.wait()
            shutil.rmtree(folder)  # the next one starts over
            continue
        for _ in range(rng.randrange(60)):
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for step in list_steps(folder / "checkpoints"):
            verify(folder / "checkpoints" / f"{step:08d}")
    run(cache, *LONG, "--data", text, "--out", folder)
    return resumed


class Killed(BaseException):
    """What no handler of ours catches."""


def kill() -> None:
    raise Killed


def test_a_run_that_ends_anywhere_resumes_to_the_same_losses(text, short, tmp_path):
    """Without another save; a process that is killed is the slow test below."""
    arguments = (*SHORT, "--data", text, "--out", tmp_path / "run")
    with pytest.raises(Killed):
        run_here(*arguments, moment="step 20/30", then=kill)
    assert 14 <= int(find_step(tmp_path / "run").name) <= 20
    out, _ = run_here(*arguments)
    assert "resuming" in out and losses(tmp_path / "run") == short


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_losses(cache, text, short):
    """In a process of its own, as users start it."""
    folder = cache / "killed"
    process = start(cache, *SHORT, "--data", text, "--out", folder)
    wait_for(process, "step 20/30")
    process.kill()
    process.communicate()
    assert not (folder / "checkpoints" / "00000030").exists()
    verify(find_step(folder))
    (begun,) = [row for row in read_log(folder, "event") if row["what"] == "first update"]
    assert 0 < begun["seconds"] < 300
    out, _ = run_here(*SHORT, "--data", text, "--out", folder)
    assert "resuming" in out and losses(folder) == short


@pytest.mark.slow
def test_a_signal_between_steps_saves_and_the_run_goes_on(text, short, stopped, tmp_path):
    folder, out, err = stopped
    step = int(re.search(r"saved step (\d+)", out)[1])
    assert step >= 10 and find_step(folder).name == f"{step:08d}"
    assert "SIGTERM" in err
    shutil.copytree(folder, tmp_path / "run")
    run_here(*SHORT, "--data", text, "--out", tmp_path / "run")
    assert losses(tmp_path / "run") == short


@pytest.mark.slow
def test_twenty_kills_leave_the_losses_equal_to_the_bit(cache, text, uninterrupted):
    folder = cache / "killed-often"
    assert kill_at_random(cache, text, folder, kills=20) >= 5
    assert losses(folder) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize(("name", "called"), [("SIGTERM", "SIGTERM"), ("SIGINT", "Ctrl-C")])
def test_a_signal_to_a_process_saves_and_the_run_goes_on(cache, text, uninterrupted, name, called):
    folder = cache / name
    process = start(cache, *LONG, "--data", text, "--out", folder)
    wait_for(process, r"step 5/150")
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=120)
    assert process.returncode == EXIT_SAVED, (out, err)
    step = int(re.search(r"saved step (\d+)", out)[1])
    assert step >= 5 and find_step(folder).name == f"{step:08d}"
    assert called in err and "Traceback" not in err
    run(cache, *LONG, "--data", text, "--out", folder)
    assert losses(folder) == uninterrupted


@pytest.mark.slow
def test_a_signal_while_compiling_or_evaluating_keeps_what_there_is(cache, text, uninterrupted):
    folder = cache / "early"
    for moment in ("starting a new run", "compiled the step"):  # what follows is compilation, evaluation
        process = start(cache, *LONG, "--data", text, "--out", folder)
        wait_for(process, moment)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
        assert process.returncode == EXIT_KEPT, (out, err)
        assert "nothing to keep yet" in out
        shutil.rmtree(folder)
    process = start(cache, *LONG, "--data", text, "--out", folder)
    wait_for(process, "step 50: valid")  # the evaluation before step 50: its end; sampling and a save follow
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == EXIT_SAVED
    run(cache, *LONG, "--data", text, "--out", folder)
    assert losses(folder) == uninterrupted


@pytest.mark.slow
def test_a_signal_in_the_last_evaluation_leaves_it_to_the_next_start(cache, text, tmp_path):
    prepared, folder = tmp_path / "prepared", tmp_path / "run"
    large = make_text(tmp_path, repeats=3000)  # a second and more to evaluate, four windows at a time
    sets = ("--tokenizer", "bytes", "--context", "32", "--valid", f"large={large}")
    run(cache, text, *sets, "--out", prepared, module="train_tpu.prepare")
    arguments = (*TINY, "--data", prepared, "--out", folder)
    process = start(cache, *arguments)
    wait_for(process, r"step 11/12")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == EXIT_SAVED
    assert [row["step"] for row in read_log(folder, "eval")] == [0, 5, 10]
    run(cache, *arguments)
    assert [row["step"] for row in read_log(folder, "eval")] == [0, 5, 10, 12]
    assert len(losses(folder)) == 12
    out, _ = run(cache, *arguments)
    assert "has finished" in out


@pytest.mark.slow
def test_a_second_signal_leaves_at_once_and_damages_nothing(cache, text, uninterrupted):
    folder = cache / "twice"
    process = start(cache, *LONG, "--data", text, "--out", folder)
    wait_for(process, r"step 15/150")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode in (EXIT_KEPT, EXIT_SAVED)  # saved if it was done before the second came
    for step in list_steps(folder / "checkpoints"):
        verify(folder / "checkpoints" / f"{step:08d}")
    run(cache, *LONG, "--data", text, "--out", folder)
    assert losses(folder) == uninterrupted


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_and_fallback_goes_behind_it(text, short, stopped, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(stopped[0], folder)
    command = (*SHORT, "--data", text, "--out", folder)
    newest = find_step(folder)
    victim = max((p for p in (newest / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    flip_bit(victim)
    message = refusal_here(*command)
    assert victim.name in message and "--fallback" in message
    assert find_step(folder) == newest  # nothing was removed
    out, _ = run_here(*command, "--fallback")
    assert f"damaged-{newest.name}" in out and "resuming" in out
    assert losses(folder) == short


def test_a_second_process_on_the_same_folder_is_refused(text, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    with lock_folder(folder):
        assert "another process" in refusal_here(*SHORT, "--data", text, "--out", folder)


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_old_checkpoint_stays(cache, text, uninterrupted):
    folder = cache / "full"
    command = (*LONG, "--data", text, "--out", folder)
    stop_at(10, cache, command)
    before = find_step(folder)

    def limit_file_size() -> None:  # every file above 6 kB fails as on a full disk; the arrays are larger
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    small_cache = {"JAX_COMPILATION_CACHE_DIR": "", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    process = start(cache, *command, preexec_fn=limit_file_size, environ=small_cache)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, (out, err)
    sentences = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1 and ("room" in sentences[0] or "full" in sentences[0])
    assert find_step(folder) == before
    verify(before)
    run(cache, *command)
    assert losses(folder) == uninterrupted


@pytest.mark.slow
def test_a_damaged_record_is_named_or_left_out(cache, tmp_path):
    prepared = tmp_path / "prepared"
    text = make_text(tmp_path, repeats=6000)  # several chunks of records: a flipped bit costs one chunk
    run(cache, text, "--tokenizer", "bytes", "--context", "32", "--out", prepared, module="train_tpu.prepare")
    train = next(path for path in prepared.iterdir() if "train" in path.name)
    data = bytearray(train.read_bytes())
    data[len(data) // 2] ^= 4
    train.write_bytes(data)
    command = (
        *without(TINY, "--steps"),
        "--data",
        prepared,
        "--epochs",
        "1",
        "--batch",
        "256",
        "--sigma",
        "0",
    )
    message = refusal(cache, *command, "--out", tmp_path / "fail")
    assert train.name in message and "train record" in message
    if read_log(tmp_path / "fail", "train"):  # it failed on the way: what was learned is kept
        assert list_steps(tmp_path / "fail" / "checkpoints")
    run(cache, *command, "--out", tmp_path / "skip", "--on-bad-record", "skip")
    left_out = [
        row for row in read_log(tmp_path / "skip", "event") if row["what"] == "damaged records left out"
    ]
    left_out = [record for row in left_out for record in row["records"]]
    windows = open_dataset(prepared).splits["train"].windows
    assert int(re.search(r"train record (\d+)", message)[1]) in left_out
    assert len(left_out) < windows / 2
    assert len(read_log(tmp_path / "skip", "train")) == windows // 256
    assert not read_log(tmp_path / "skip", "skip")  # the rest of each batch trained the model
